"""Targets that no other test runs: their commands are ones that the programs take."""

import shlex
import subprocess

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
