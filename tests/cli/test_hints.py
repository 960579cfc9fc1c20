"""What people type wrong is answered by one line that names what to type; nothing is written."""

import os
import shlex

import pytest

from src.audit import main as audit
from src.diagnose import main as diagnose
from src.report import main as report
from src.train import main

TYPED = {
    # Words of other programs.
    "lr=1e-3": "type recipe.learning_rate=1e-3",
    "learning_rate=1e-3": "type recipe.learning_rate=1e-3",
    "recipe.lr=1e-3": "type recipe.learning_rate=1e-3",
    "optimizer.lr=1e-3": "type recipe.learning_rate=1e-3",
    "optimizer=adamw": "AdamW is the only optimizer; type recipe.learning_rate",
    "epochs=3": "measured in optimizer steps; type recipe.max_steps=",
    "trainer.max_epochs=3": "measured in optimizer steps; type recipe.max_steps=",
    "trainer.max_steps=100": "type recipe.max_steps=100",
    "batch=32": "type recipe.batch_size=32",
    "batch_size=32": "type recipe.batch_size=32",
    "per_device_train_batch_size=8": "type recipe.batch_size=8",
    "block_size=64": "type recipe.seq_len=64",
    "n_layers=6": "type model.num_layers=6",
    "model.n_heads=4": "type model.num_heads=4",
    "d_model=64": "type model.hidden_dim=64",
    "inner_dim=96": "type ffn.inner_dim=96 or model.inner_dim=96",
    "num_experts=8": "type ffn.num_routed=8",
    "model.dropout=0.1": "there is no dropout; leave it out",
    "warmup_steps=100": "type recipe.warmup_frac=",
    "grad_clip=1.0": "type recipe.clip_norm=1.0",
    "trainer.precision=16": "type recipe.precision=bf16-mixed",
    "trainer.accumulate_grad_batches=4": "type recipe.accumulate=4",
    "gpus=2": "type trainer=gpu, or trainer=ddp trainer.devices=",
    "device=cuda": "type trainer=auto, trainer=cpu or trainer=gpu",
    "output_dir=x": "type paths.runs=x",
    "run_name=x": "type study=x",
    "wandb=true": "type tracking=mlflow or tracking=local",
    "resume_from=x": "type resume=x",
    "dataset=wikitext": "type data=text data.path=FILE",
    # Spelling.
    "stability=EMA": "type stability=ema",
    "attention=MLA": "type attention=mlha",
    "attention=gka": "did you mean gqa?",
    "Recipe.Max_Steps=3": "type recipe.max_steps=3",
    "recipe.max-steps=3": "type recipe.max_steps=3",
    "recipe/max_steps=3": "type recipe.max_steps=3",
    "recipe.max_stps=3": "did you mean recipe.max_steps?",
    # Options.
    "data=book.txt": "type data=text data.path=book.txt",
    "data=my/books": "type data=text data.path=my/books",
    "data=ids.bin": "type data=tokens data.path=ids.bin",
    "tokenizer=runs/a": "type tokenizer=checkpoint tokenizer.path=runs/a",
    "model=net:build": "type model=external model.target=net:build",
    "stability=[ema,clip03": "the closing ] is missing",
    "stability=ema,clip03]": "the opening [ is missing",
    "recipe.betas=[0.9,0.95": "the closing ] is missing",
    "ema=true": "type stability=ema",
    "stability.ema=true": "type stability=ema",
    "stability=ema+clip03": "type stability=[ema,clip03]",
    "stability.ema.decay=0.9": "type stability=ema as well",
    "stability.emma.decay=0.9": "did you mean ema?",
    "data.path=text.txt": "is a field of data=text and data=tokens; type that as well",
    "trainer=cuda": "type trainer=gpu",
    "tracking=none": "type tracking=local",
    "model=gpt2": "type model=external",
    "preset=tiny": "type preset=smoke",
    # The grammar.
    "+foo=1": "type fields as field=value, without + or ~",
    "+recipe.learning_rate=1": "without + or ~; type recipe.learning_rate=1",
    "~stability": "without + or ~; type stability=none",
    "lr 1e-3": "type recipe.learning_rate=1e-3",
    "stability ema": "type stability=ema",
    "recipe.max_steps = 3": "type recipe.max_steps=",
    "help": "type --help",
    # Flags.
    "--lr 1e-3": "type recipe.learning_rate=1e-3",
    "--learning-rate=1e-3": "type recipe.learning_rate=1e-3",
    "--epochs 3": "type recipe.max_steps=",
    "--stability ema": "type stability=ema",
    "--ema": "type stability=ema",
    "--seed=3": "type seed=3",
    "--dry-run": "type plan=true",
    "--config-name=x": "type --config-dir=FOLDER",
    "--config-path conf": "type --config-dir=FOLDER",
    "--config-dir=/no/such": "--config-dir=/no/such: no such folder",
    "--version": "type --info",
    "--cfg hydra": "type --cfg job",
    "--cfg": "type --cfg job",
    # Hydra's own settings.
    "hydra.run.dir=x": "type paths.runs=FOLDER and study=NAME",
    "hydra.sweep.dir=x": "type paths.runs=FOLDER and study=NAME",
    "hydra.job.name=x": "type study=NAME",
    "hydra.job.chdir=true": "leave it out",
    "hydra.searchpath=[file:///x]": "type --config-dir=FOLDER",
    "hydra/launcher=slurm": "add --multirun",
    # Sweeps.
    "seed=0,1": "add --multirun",
    "seed=[0,1]": "type --multirun seed=0,1",
    "experiment=stability": "add --multirun",
    "n_jobs=2": "add --multirun",
    "--multirun experiment=stablity": "did you mean stability?",
    "--multirun experiment=stability lr=1e-3": "type recipe.learning_rate=0.001",
    "--multirun attention=gka,mlha": "did you mean gqa?",
    "--multirun lr=1e-3,1e-4": "type recipe.learning_rate=",
    "--multirun seed=0,1 hydra.sweep.dir=x": "type paths.runs=FOLDER and study=NAME",
    "--multirun seed=0,1 hydra.launcher.n_jobs=4": "type n_jobs=<number>",
    "--multirun seed=0,1 hydra/launcher=submitit_slurm": "type hydra/launcher=slurm",
    # Values.
    "recipe.max_steps=1e3": "type recipe.max_steps=1000",
    "recipe.precision=bf16": "must be one of 32-true, bf16-mixed",
    "save_at=250": "type save_at=[250]",
    "plan=yes": "must be true or false",
}
"""A command line of src.train, and what its error says."""

DIAGNOSE = {
    "dtype=bfloat16": "type precision=bf16-true",
    "--dtype fp16": "type precision=16-true",
    "dtype=torch.float64": "type precision=64-true",
    "precision=fp8": "must be one of null, 32-true",
}
"""The same for src.diagnose."""


@pytest.mark.parametrize("line", DIAGNOSE)
def test_diagnose_names_the_precision_that_is_meant(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert diagnose(["checkpoint=x", *shlex.split(line)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert DIAGNOSE[line] in error


@pytest.mark.parametrize("line", TYPED)
def test_one_line_names_what_to_type_instead(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert TYPED[line] in error
    assert os.listdir() == []


def test_a_hint_repeats_no_password(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in ("tracking_uri=http://me:hunter2@host", "--mlflow_uri=http://me:hunter2@host"):
        assert main([line]) == 2
        error = capsys.readouterr().err
        assert "type tracking.uri=http://host" in error
        assert "hunter2" not in error


def test_several_studies_of_a_report_are_told_how_a_list_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report(["studies=mine,other"]) == 2
    told = "error: studies=mine,other: must be a single value; type 'studies=[mine,other]'"
    assert capsys.readouterr().err.strip() == told


@pytest.mark.parametrize(
    ("command", "word", "field"),
    [
        (diagnose, "runs/a/last.ckpt", "checkpoint"),
        (audit, "my_model:build", "target"),
        (report, "mine", "study"),
    ],
)
def test_a_value_without_a_field_is_told_its_field(
    command, word, field, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command([word]) == 2
    assert capsys.readouterr().err == f"error: {word}: cannot be read; type {field}={word}\n"


@pytest.mark.parametrize("line", ["seed=", "recipe.learning_rate=", "guard.check="])
def test_a_field_without_a_value_is_told(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([line]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}: must be a") and "; type a value after =" in shown


def test_a_study_that_is_typed_nearly_right_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        folder = tmp_path / "runs" / name / "none" / "seed-0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
    assert report(["study=mien"]) == 2
    told = "study=mien: has no runs in runs (did you mean mine? allowed: mine, other)"
    assert told in capsys.readouterr().err
