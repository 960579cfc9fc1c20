"""Targets that no other test runs: their commands are ones that the programs take."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from src.config.compose import compose
from src.config.hydra_compose import compose_plain
from src.lab.benchmark.run_benchmark import _cases
from src.sweep.plan import make_plan
from tests.runs import ROOT


def commands(target: str) -> list[list[str]]:
    """What a target would run of this project: the module and its arguments."""
    asked = ["make", "-n", target, "BIN=bin", "READY="]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line.partition("||")[0]) for line in found.splitlines()]
    return [line[line.index("-m") + 1 :] for line in lines if "-m" in line]


def test_the_commands_of_the_gpu_report_are_right():
    ran = []
    for module, *arguments in commands("gpu-report"):
        ran.append(module)
        if module == "src.lab":
            command, *fields = arguments
            assert command == "bench"
            given = compose_plain("bench", fields) | {"device": "cpu"}
            assert [case.sizes.model for case in _cases(given)] == given["shapes"]
        elif module == "src.train":
            # No GPU is here, and none is asked for.
            fields = [a for a in arguments if a not in ("trainer=gpu", "--multirun")]
            if "--multirun" in arguments:
                assert len(make_plan("train", [*fields, "trainer=cpu"]).cells) == 8
            else:
                assert compose("train", [*fields, "trainer=cpu"]).recipe.max_steps == 11_000
    assert ran == ["src.lab"] * 3 + ["src.train"] * 2 + ["src.report"]


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs make with this Python in place of the environment's."""
    asked = ["make", "-f", str(ROOT / "Makefile"), "READY=", f"BIN={Path(sys.executable).parent}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # As from a shell: make hands its own variables on to the make that it starts.
    # The suite itself is run by make, whose level would show in what this one prints.
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "STUDY")
    env = {name: value for name, value in os.environ.items() if name not in of_make}
    return subprocess.run(
        [*asked, *words],
        cwd=cwd,
        env=env | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("port=5057", "type PORT=..."),
        ("n_jobs=2", "type N_JOBS=..."),
        ("seeds=0 1", "type SEEDS=..."),
        ("tracking.uri=x", "type ARGS='tracking.uri=...'"),
    ],
)
def test_a_variable_that_make_does_not_know_is_refused_in_one_line(typed, meant):
    done = make("-n", "ui", typed)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{typed.partition('=')[0]}=: make has no such variable; {meant}" in done.stderr


def test_known_variables_may_hold_blanks():
    done = make("-n", "ablate", "ARGS=preset=smoke plan=true", "SEEDS=0,1", "EXPERIMENT=stability")
    assert done.returncode == 0, done.stderr
    assert "preset=smoke plan=true" in done.stdout


def test_bad_input_is_said_once(tmp_path):
    done = make("ablate", "SEEDS=x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("seed=x: must be an integer") == 1


@pytest.mark.parametrize("target", ["report", "notebook"])
def test_report_and_notebook_say_which_study_they_take_or_that_there_is_none(target, tmp_path):
    none = make(target, cwd=tmp_path)
    assert none.returncode == 2
    assert "error: STUDY: there are no runs in runs yet; type make train" in none.stderr
    for place, name in enumerate(("newer", "older")):
        run = tmp_path / "runs" / name / "mlha+moe+none" / "seed-0"
        run.mkdir(parents=True)
        for file in ("config.yaml", "record.json"):
            (run / file).write_text("{}")
        os.utime(run / "record.json", (9e8 - place, 9e8 - place))
    wrong = make(target, "STUDY=nope", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "study=nope: has no runs in runs (allowed: newer, older)" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    # A program in place of Python says what it was started with, and finds the study as Python.
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(
        f'#!/bin/sh\ncase "$2" in *find_study) exec {sys.executable} "$@";; esac\n'
        'echo "SMOL_STUDY=$SMOL_STUDY" "$@"\n'
    )
    stand_in.chmod(0o755)
    found = make(target, f"BIN={stand_in.parent}", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "study newer, the latest; type STUDY=NAME for another" in found.stderr
    assert ("study=newer" if target == "report" else "SMOL_STUDY=newer") in found.stdout
