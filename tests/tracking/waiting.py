"""The training command, held in the middle of a run until the test has done what it wants."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import TINY
from tests.runs import ROOT

PATIENCE_SECONDS = 600
WITH_MLFLOW = [argument for argument in TINY if argument != "tracking=local"]

_CODE = """
import sys, time
from pathlib import Path
from src.train import main
from src.training.task import LanguageModelTask

step = LanguageModelTask.training_step

def wait_in_the_middle(self, batch, batch_idx):
    while self.trainer.global_step == 8 and not Path("go").exists():
        time.sleep(0.05)
    return step(self, batch, batch_idx)

LanguageModelTask.training_step = wait_in_the_middle
sys.exit(main(sys.argv[1:]))
"""


def start_waiting(arguments: Sequence[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """A tiny run that has made eight of its twelve steps and goes on once cwd/go is there."""
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, *WITH_MLFLOW, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], object]) -> None:
    """Waits, and fails where it takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
