"""Sweeps on a real Slurm: `make test-slurm` installs it and runs this."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import TINY
from tests.runs import metrics, record, start, train
from tests.slurm.cluster import slurm
from tests.tracking.server import MlflowServer
from tests.tracking.waiting import until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed"),
]

STEPS = 1500
LENGTH = [f"recipe.max_steps={STEPS}", "recipe.checkpoint_every=100", "recipe.log_every=50"]
CLUSTER = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "n_jobs=4"]
TOO_FEW = ["recipe.batch_size=4", "hydra.launcher.gpus_per_node=1"]
RATES = ["1e-3", "2e-3", "3e-3", "1e30"]


@pytest.fixture
def server(tmp_path):
    served = MlflowServer(tmp_path / "mlflow.db")
    try:
        served.start()
        until(served.answers)
        yield served.uri
    finally:
        served.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def _arguments(cache: Path, study: str, rates: list[str]) -> list[str]:
    rate = f"recipe.learning_rate={','.join(rates)}"
    own = [rate, f"study={study}", "trainer=cpu", f"paths.cache={cache}"]
    return [*TINY, *LENGTH, "guard.on_nonfinite=raise", *own]


def _folders(study: Path) -> dict[str, Path]:
    """Run folders by learning rate."""
    return {
        re.search(r"learning_rate: (\S+)", (run / "config.yaml").read_text())[1]: run
        for run in study.glob("*/seed-0")
        if (run / "config.yaml").exists()
    }


def _await(what, process, *, seconds=240):
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


def _steps(study: Path) -> list[int]:
    return sorted(
        int(lines[-1]["step"]) for run in study.glob("*/seed-0") if (lines := metrics(run))
    )


def _queue(env: dict[str, str], form: str) -> list[str]:
    asked = ["squeue", "--noheader", "--array", f"--format={form}"]
    return subprocess.run(asked, env=env, capture_output=True, text=True).stdout.split()


def test_a_preempted_job_goes_on_and_a_failing_one_keeps_no_other(
    cluster, tmp_path, shared_cache, monkeypatch
):
    arguments = _arguments(shared_cache, "abl", RATES)
    process = start("train", ["--multirun", *CLUSTER, *arguments], tmp_path, **cluster)
    study = tmp_path / "runs" / "abl"
    _await(lambda: sum(step >= 200 for step in _steps(study)) >= 3, process)
    first = sorted(_queue(cluster, "%i"))[0]
    subprocess.run(["scontrol", "requeue", first], env=cluster, check=True)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert "1 failed, 3 finished" in output
    assert "FloatingPointError" in errors
    assert (study / "report" / "report.html").is_file()
    assert "warning: the launcher" not in errors

    runs = _folders(study)
    finished = {rate: run for rate, run in runs.items() if rate != "1.0e+30"}
    assert len(finished) == 3
    logs = [(run / "train.log").read_text() for run in finished.values()]
    assert sum("stopped by a signal" in log for log in logs) == 1
    monkeypatch.chdir(tmp_path)
    for rate, run in finished.items():
        assert record(run)["status"] == "finished"
        alone = train(_arguments(shared_cache, f"alone-{rate}", [rate]))
        assert metrics(run) == metrics(alone)


def test_a_sweep_whose_process_died_loses_nothing_and_repeats_nothing(
    cluster, tmp_path, shared_cache
):
    one_at_a_time = [*CLUSTER[:2], "n_jobs=1"]
    arguments = ["--multirun", *one_at_a_time, *_arguments(shared_cache, "died", RATES[:3])]
    process = start("train", arguments, tmp_path, **cluster)
    study = tmp_path / "runs" / "died"
    _await(lambda: any(step >= 100 for step in _steps(study)), process)
    (status,) = (json.loads(f.read_text()) for f in study.glob(".sweeps/*/status-*.json"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    # One runs, two wait.
    assert sorted(_queue(cluster, "%T")) == ["PENDING", "PENDING", "RUNNING"]
    again = start("train", arguments, tmp_path, **cluster)
    _await(lambda: len(_queue(cluster, "%A")) == 3, again)
    # The one that runs has not been touched.
    assert os.path.exists(f"/proc/{status['pid']}") or STEPS in _steps(study)
    output, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors
    assert "3 finished" in output
    assert len(_folders(study)) == 3
    for run in _folders(study).values():
        log = (run / "train.log").read_text()
        assert metrics(run)[-1]["step"] == STEPS
        assert "stopped by a signal" not in log


def test_ctrl_c_ends_what_runs_with_a_checkpoint_and_takes_the_rest_out_of_the_queue(
    cluster, tmp_path, shared_cache
):
    arguments = _arguments(shared_cache, "stopped", RATES[:3])
    process = start(
        "train", ["--multirun", *CLUSTER[:2], "n_jobs=1", *arguments], tmp_path, **cluster
    )
    study = tmp_path / "runs" / "stopped"
    _await(lambda: any(step >= 100 for step in _steps(study)), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "1 stopped, 2 waiting" in output
    assert _queue(cluster, "%T") in ([], ["COMPLETING"])
    (run,) = _folders(study).values()
    assert record(run)["status"] == "killed"


def test_shared_beginnings_several_processes_and_the_parent_run_are_as_on_one_machine(
    cluster, server, tmp_path, shared_cache
):
    own = ["study=shared", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    more = ["tracking=mlflow", f"tracking.uri={server}", f"paths.cache={shared_cache}"]
    swept = ["stability=warmdown,ema", "seed=0,1", "recipe.batch_size=4", "recipe.max_steps=110"]
    two_cores = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", "n_jobs=2"]
    arguments = ["--multirun", *two_cores, *TINY, *own, *more, *swept]
    process = start("train", arguments, tmp_path, **cluster)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    study = tmp_path / "runs" / "shared"
    runs = sorted(study.glob("*/seed-*"))
    assert len(runs) == 6 and (study / "report" / "report.html").is_file()
    for run in runs:
        assert record(run)["status"] == "finished"
        assert (record(run)["derived_from"] is not None) == ("none" not in run.parent.name)
    client = MlflowClient(server)
    (experiment,) = (e for e in client.search_experiments() if e.name == "shared")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    (parent,) = (run for run in found.values() if "mlflow.parentRunId" not in run.data.tags)
    assert len(found) == 7 and parent.info.status == "FINISHED"
    # The same command again has nothing to do.
    before = {run: metrics(run) for run in runs}
    again = start("train", arguments, tmp_path, **cluster)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "6 skipped, finished before" in output
    assert {run: metrics(run) for run in runs} == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=2", *TOO_FEW],
            "hydra.launcher.gpus_per_node=1: must be at least trainer.devices=2",
        ),
        ([], "trainer.accelerator=auto: the devices of other nodes are not known here"),
        (["trainer=cpu", "hydra.launcher.partiton=x"], "hydra.launcher.partiton"),
        (["trainer=cpu", "tracking=mlflow"], "mlflow.db: must be the address of a server"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_submitted(cluster, tmp_path, arguments, line):
    more = ["hydra/launcher=slurm", "seed=0,1", *arguments]
    process = start("train", ["--multirun", *TINY, *more], tmp_path, **cluster)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert line in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_partition_that_is_not_there_is_said_as_slurm_says_it(cluster, tmp_path, shared_cache):
    arguments = _arguments(shared_cache, "nowhere", RATES[:2])
    more = ["hydra/launcher=slurm", "hydra.launcher.partition=nowhere"]
    process = start("train", ["--multirun", *more, *arguments], tmp_path, **cluster)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "invalid partition specified: nowhere" in errors


def test_a_job_whose_time_is_up_is_started_again_where_it_was(cluster, tmp_path, shared_cache):
    arguments = _arguments(shared_cache, "short", RATES[:1])
    # Slurm counts in minutes, and looks once in half a minute.
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=20"]
    more = ["seed=0,1", "recipe.max_steps=3000"]
    process = start(
        "train", ["--multirun", *CLUSTER, *limits, *arguments, *more], tmp_path, **cluster
    )
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    logs = [file.read_text() for file in (tmp_path / "runs" / "short").glob("*/seed-*/train.log")]
    assert len(logs) == 2
    assert all("stopped by a signal" in log for log in logs)
