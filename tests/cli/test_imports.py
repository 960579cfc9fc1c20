"""What each command imports: nothing heavy before it has to, and no trainer where none trains."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, start

COMMANDS = (
    "train",
    "describe",
    "generate",
    "report",
    "replay",
    "diagnose",
    "audit",
    "convert",
    "sync",
    "ui",
)
NUMERIC = ("torch", "numpy", "pandas", "lightning", "transformers", "mlflow")
TRAINERS = ("lightning", "pytorch_lightning", "transformers")

PROGRAM = """
import contextlib, importlib, io, json, os, shlex, sys
found = []
for command, *arguments in map(shlex.split, sys.argv[1:]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = importlib.import_module(f"src.{command}").main(arguments)
        except SystemExit as ended:
            code = ended.code
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    found.append([code, modules, out.getvalue(), os.listdir()])
print(json.dumps(found))
"""


def imported(*lines: str, cwd: Path) -> list[tuple[int, set[str], str, list[str]]]:
    """Of commands one after the other: exit code, top-level modules, standard output and files.

    All in one process: what none of them may import is found at the first that does.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(lines)
    return [(code, set(modules), out, files) for code, modules, out, files in found]


def test_help_imports_nothing_heavy(tmp_path):
    lines = [f"{command} --help" for command in COMMANDS]
    for command, found in zip(COMMANDS, imported(*lines, cwd=tmp_path), strict=True):
        code, modules, out, _ = found
        assert code == 0, command
        assert out.startswith(f"python -m src.{command}")
        assert not modules & {*NUMERIC, "hydra"}, command


MISTYPED = (
    "train --fast",
    "train attention=gka",
    "train recipe.learnin_rate=1",
    "train +foo=1",
    "train hydra.run.dir=x",
    "train --multirun stability=none,emma",
    "train --multirun experiment=stablity",
    "train --multirun seed=0,1 lr=1e-3",
    "describe preset=huge",
    *(f"{command} nonsense=1" for command in COMMANDS),
    "train seed=x",
    "train repeat=-1",
    "train recipe.max_steps=ten",
    "train recipe.max_steps=-5",
    "train recipe.max_steps=1e2",
    "train recipe.schedule=steps",
    "train ffn.top_k=x",
    "train stability=ema stability.ema.decay=high",
    "train rerun=perhaps",
    "train model=external",
    "train data=text",
    "train --multirun recipe.max_steps=3,ten",
    "train study=../x",
    "describe model.num_layers=two",
    "report",
    "report study=nope",
    "report csv=nope.csv arm=a seed=s endpoint=e",
    "report mlflow=runs arm=a seed=s",
)
BAD_PATHS = (
    "diagnose checkpoint=nope.pt",
    "diagnose checkpoint=here",
    "diagnose checkpoint=w.pt batch=nope.npy",
    "diagnose checkpoint=w.pt precision=fp8",
    "diagnose checkpoint=w.pt top=0",
    "diagnose checkpoint=w.pt format=xml",
    "diagnose checkpoint=w.pt kwargs=3",
    "diagnose checkpoint=w.pt +traget=a:b",
    "audit",
    "audit target=a:b dtype=fp8",
    "audit target=a:b batch=nope.npy",
    "audit target=a:b witness=nope.pt",
    "audit target=a:b weights=0",
    "audit target=a:b allow=router",
    "audit checkpoint=nope.pt",
    "replay incident=nope",
    "replay incident=here",
    "replay incident=nope format=xml",
    "replay incident=nope with.ffn.top_k=1",
)


@pytest.mark.parametrize("lines", [MISTYPED, BAD_PATHS], ids=["names and numbers", "paths"])
def test_a_mistake_is_answered_before_anything_heavy_is_imported(lines, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "w.pt").touch()
    for line, found in zip(lines, imported(*lines, cwd=tmp_path), strict=True):
        code, modules, out, _ = found
        assert code == 2, line
        assert out.strip() == "", line
        assert not modules & set(NUMERIC), line


def test_what_is_shown_or_served_imports_no_trainer(tiny, tmp_path):
    """The configuration of a run, the plan of a sweep, what describe tells, and the rest."""
    from src.train import main

    assert main([*tiny, "stability=ema", "tracking=mlflow", "study=here"]) == 0
    run = next(Path("runs").rglob("record.json")).parent
    before = os.listdir()
    shown, planned, described, *others = imported(
        "train stability=ema --cfg job",
        "train --multirun preset=smoke tracking=local stability=none,ema plan=true",
        "describe 'stability=[ema,noise]' format=json",
        "report study=here",
        "sync study=here",
        f"generate 'run={run}' 'prompt=To be' max_new_tokens=2",
        # A port that is none ends it after its imports.
        "ui port=1",
        cwd=tmp_path,
    )
    code, modules, out, files = shown
    assert code == 0
    assert "learning_rate: 0.003" in out
    assert not modules & {*TRAINERS, "mlflow", "pandas"}
    assert sorted(files) == sorted(before)
    code, modules, out, _ = planned
    assert code == 0
    assert "to train: 2 runs" in out
    assert not modules & set(TRAINERS)
    code, modules, _, _ = described
    assert code == 0
    assert not modules & set(TRAINERS)
    assert [code for code, _, _, _ in others] == [0, 0, 0, 2]
    for command, (_, modules, _, _) in zip(
        ("report", "sync", "generate", "ui"), others, strict=True
    ):
        assert not modules & set(TRAINERS), command


def test_a_run_is_named_before_pytorch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)\n")
    process = start("train", ["stability=ema", "study=here", "seed=3"], tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 7, err
    assert out == (
        "loading PyTorch for mlha + moe, ema, model proxy: 1,100 steps, in"
        " runs/here/mlha+moe+ema/seed-3\n"
    )


def test_what_is_only_shown_or_starts_from_a_saved_model_is_not_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)\n")
    for arguments in (["plan=true"], ["--cfg", "job"], ["init=runs/a"]):
        process = start("train", arguments, tmp_path)
        assert process.communicate(timeout=600)[0] == "", arguments
        assert process.returncode == 7, arguments
