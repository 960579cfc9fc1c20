"""A command that is killed leaves no process behind, however many it has started."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import free_port, start

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="counts processes in /proc"),
    # Of the fast ones tests/sweep/test_sweep.py kills a sweep, tests/run/test_ddp.py a run.
    pytest.mark.slow,
]
MARK = "SMOLDEEPSEEK_TEST_MARK"
"""A variable that every process of a test inherits, and no other has."""
SECONDS = 10
"""In which all are gone."""


def marked(mark: str) -> dict[int, str]:
    """The processes of a test, with their command lines; none that is only a number any more."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def wait_till(
    condition: Callable[[dict[int, str]], object], mark: str, process: subprocess.Popen[str]
) -> None:
    """Waits as long as the command runs: how long it takes is the machine's affair."""
    while not condition(marked(mark)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def assert_all_end(
    command: str, arguments: list[str], *, when: Callable[[dict[int, str]], object]
) -> None:
    """Kills the command when its processes are as they shall be; all others end as well."""
    mark = uuid.uuid4().hex
    process = start(command, arguments, Path.cwd(), **{MARK: mark, "MLFLOW_TRACKING_URI": ""})
    try:
        wait_till(when, mark, process)
        assert len(marked(mark)) > 1
        process.kill()
        process.wait()
        wait_for(lambda: not marked(mark), SECONDS)
        assert marked(mark) == {}
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def num_trained() -> int:
    """Runs below runs/ that have made steps."""
    return sum(file.stat().st_size > 0 for file in Path("runs").rglob("metrics.jsonl"))


def are_training(processes: dict[int, str]) -> bool:
    return num_trained() == 2


def is_first_worker_there(processes: dict[int, str]) -> bool:
    return any("loky" in line and "resource_tracker" not in line for line in processes.values())


def is_fork_server_there(processes: dict[int, str]) -> bool:
    return any("forkserver" in line for line in processes.values())


SWEEP = ["--multirun", "stability=none", "seed=0,1,2,3", "n_jobs=2", "study=killed"]
"""With jobs that wait."""
LONG = ["recipe.max_steps=20000", "recipe.num_validations=1", "recipe.log_every=1"]


@pytest.mark.parametrize("when", [is_first_worker_there, is_fork_server_there, are_training])
def test_a_sweep(when, tiny):
    assert_all_end("train", [*SWEEP, *tiny, *LONG], when=when)


@pytest.mark.parametrize("number", range(10))
def test_ten_sweeps(number, tiny):
    """Killed at ten moments, from the first worker on."""
    begin: list[float] = []

    def is_so_old(processes: dict[int, str]) -> bool:
        if is_first_worker_there(processes) and not begin:
            begin.append(time.monotonic())
        return bool(begin) and time.monotonic() - begin[0] > 1.5 * number

    assert_all_end("train", [*SWEEP, *tiny, *LONG], when=is_so_old)


def test_a_sweep_of_one_job_at_a_time(tiny):
    arguments = [*SWEEP, "n_jobs=1", *tiny, *LONG]
    assert_all_end("train", arguments, when=lambda processes: num_trained() == 1)


def test_a_run_on_two_devices(tiny):
    arguments = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", *tiny, *LONG]
    assert_all_end("train", arguments, when=lambda processes: num_trained() == 1)


def test_mlflows_server(tiny):
    """Which has a process of its own below the one that it is."""
    assert_all_end("ui", [f"port={free_port()}"], when=lambda found: "uvicorn" in str(found))


def test_the_detector(tiny):
    arguments = ["n_jobs=2", "seeds=[1000]", "unseen=[2000]"]
    assert_all_end("lab", ["detect", *arguments], when=lambda processes: num_trained() > 0)


def test_the_benchmark(tiny):
    arguments = ["bench", "shapes=[proxy]", "cells=[mlha+moe]", "steps=1000000", "threads=1"]
    assert_all_end("lab", arguments, when=lambda found: str(found).count("benchmark.worker") > 1)
