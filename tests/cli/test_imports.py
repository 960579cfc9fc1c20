"""What each command imports: nothing heavy before it has to, and no trainer where none trains."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

COMMANDS = (
    "train",
    "describe",
    "generate",
    "report",
    "replay",
    "diagnose",
    "convert",
    "sync",
    "ui",
)
NUMERIC = ("torch", "numpy", "pandas", "lightning", "transformers", "mlflow")
TRAINERS = ("lightning", "pytorch_lightning", "transformers")

PROGRAM = """
import importlib, json, sys
code = importlib.import_module(f"src.{sys.argv[1]}").main(sys.argv[2:])
print()
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(command: str, *arguments: str, cwd: Path) -> tuple[int, set[str], str]:
    """Exit code, top-level modules and standard output of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.stdout, done.stderr
    out, _, last = done.stdout.rstrip().rpartition("\n")
    code, modules = json.loads(last)
    return code, set(modules), out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command, tmp_path):
    code, modules, out = imported(command, "--help", cwd=tmp_path)
    assert code == 0
    assert out.startswith(f"python -m src.{command}")
    assert not modules & {*NUMERIC, "hydra"}


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train", "--fast"),
        ("train", "attention=gka"),
        ("train", "recipe.learnin_rate=1"),
        ("train", "+foo=1"),
        ("train", "hydra.run.dir=x"),
        ("train", "--multirun stability=none,emma"),
        ("train", "--multirun experiment=stablity"),
        ("train", "--multirun seed=0,1 lr=1e-3"),
        ("describe", "preset=huge"),
        *((command, "nonsense=1") for command in COMMANDS),
        ("train", "seed=x"),
        ("train", "repeat=-1"),
        ("train", "recipe.max_steps=ten"),
        ("train", "recipe.max_steps=-5"),
        ("train", "recipe.max_steps=1e2"),
        ("train", "recipe.schedule=steps"),
        ("train", "ffn.top_k=x"),
        ("train", "stability=ema stability.ema.decay=high"),
        ("train", "rerun=perhaps"),
        ("train", "model=external"),
        ("train", "data=text"),
        ("train", "--multirun recipe.max_steps=3,ten"),
        ("describe", "model.num_layers=two"),
        ("report", ""),
        ("report", "study=nope"),
        ("report", "csv=nope.csv arm=a seed=s endpoint=e"),
        ("report", "mlflow=runs arm=a seed=s"),
    ],
)
def test_a_mistyped_name_or_number_is_answered_before_anything_heavy_is_imported(
    command, line, tmp_path
):
    code, modules, out = imported(command, *line.split(), cwd=tmp_path)
    assert code == 2
    assert out.strip() == ""
    assert not modules & set(NUMERIC)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("diagnose", "checkpoint=nope.pt"),
        ("diagnose", "checkpoint=here"),
        ("diagnose", "checkpoint=w.pt batch=nope.npy"),
        ("diagnose", "checkpoint=w.pt precision=fp8"),
        ("diagnose", "checkpoint=w.pt top=0"),
        ("diagnose", "checkpoint=w.pt format=xml"),
        ("diagnose", "checkpoint=w.pt kwargs=3"),
        ("diagnose", "checkpoint=w.pt +traget=a:b"),
        ("replay", "incident=nope"),
        ("replay", "incident=here"),
        ("replay", "incident=nope format=xml"),
        ("replay", "incident=nope with.ffn.top_k=1"),
    ],
)
def test_a_path_or_value_is_checked_before_anything_heavy_is_imported(command, line, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "w.pt").touch()
    code, modules, out = imported(command, *line.split(), cwd=tmp_path)
    assert code == 2
    assert out.strip() == ""
    assert not modules & set(NUMERIC)


def test_describe_imports_no_trainer(tmp_path):
    code, modules, _ = imported("describe", "stability=[ema,noise]", "format=json", cwd=tmp_path)
    assert code == 0
    assert not modules & set(TRAINERS)


def test_the_configuration_of_a_run_is_shown_without_a_trainer(tmp_path):
    code, modules, out = imported("train", "stability=ema", "--cfg", "job", cwd=tmp_path)
    assert code == 0
    assert "learning_rate: 0.003" in out
    assert not modules & {*TRAINERS, "mlflow", "pandas"}
    assert os.listdir(tmp_path) == []


def test_the_plan_of_a_sweep_is_shown_without_a_trainer(tmp_path):
    line = "--multirun preset=smoke tracking=local stability=none,ema plan=true"
    code, modules, out = imported("train", *line.split(), cwd=tmp_path)
    assert code == 0
    assert "to train: 2 runs" in out
    assert not modules & set(TRAINERS)


def test_report_sync_ui_and_generate_import_no_trainer(tiny, tmp_path):
    from src.train import main

    assert main([*tiny, "stability=ema", "tracking=mlflow", "study=here"]) == 0
    run = next(Path("runs").rglob("record.json")).parent
    for command, *arguments in (
        ("report", "study=here"),
        ("sync", "study=here"),
        ("generate", f"run={run}", "prompt=To be", "max_new_tokens=2"),
        # A port that is none ends it after its imports.
        ("ui", "port=1"),
    ):
        code, modules, _ = imported(command, *arguments, cwd=tmp_path)
        assert code == (2 if command == "ui" else 0), command
        assert not modules & set(TRAINERS), command
