"""Sweeps as processes: isolation, states, skipping, continuing, ending."""

import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from src.sweep.job import Job, JobProcess
from src.train import main
from tests.forked import fork
from tests.runs import ROOT, metrics, record, start, train

WAIT_SECONDS = 1200
SLOW = ("recipe.max_steps=2000", "recipe.num_validations=1")
"""Some seconds in a tiny run: time to be killed in."""


def sweep(tiny, cwd, *more):
    """Runs a sweep to its end in a process of its own; its code and what it said."""
    process = start("train", ["--multirun", *tiny, *more], cwd)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, out, err


def manifest(study: str) -> dict:
    (file,) = Path("runs", study, ".sweeps").glob("*.json")
    return json.loads(file.read_text())


def states(study: str) -> dict[str, str]:
    return {
        f"{cell['variant'].split('@')[0].rpartition('+')[2]}/{cell['seed']}": cell["state"]
        for cell in manifest(study)["cells"]
    }


def folder(study: str, option: str, seed: int = 0) -> Path:
    (found,) = Path("runs", study).glob(f"*+{option}@*/seed-{seed}")
    return found


def mlflow_states() -> dict[str, str]:
    """MLflow's status of the sweep and of each option's run."""
    with sqlite3.connect("mlflow.db") as database:
        rows = database.execute("select name, status from runs").fetchall()
    return {
        name.split()[0] if name.startswith("sweep") else name.split("@")[0].rpartition("+")[2]: s
        for name, s in rows
    }


def wait_for(condition, process=None):
    """Waits as long as the process runs; without one until it would be a hang."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def pid_of(study: str, option: str, seed: int = 0) -> int | None:
    """The training process of a cell that has made steps."""
    for file in Path("runs", study, ".sweeps").glob("*/status-*.json"):
        status = json.loads(file.read_text())
        job = json.loads(file.with_name(file.name.replace("status", "job")).read_text())
        path = Path(job["folder"])
        named = path.parent.name.split("@")[0].endswith(f"+{option}")
        lines = path / "metrics.jsonl"
        if named and path.name == f"seed-{seed}" and status["pid"] and lines.is_file():
            return status["pid"] if lines.stat().st_size else None
    return None


@pytest.mark.slow
def test_good_jobs_finish_beside_one_that_raises_one_that_is_killed_and_one_that_hangs(tiny):
    """And the second start repeats the bad ones alone."""
    # The guard raises in the run that fails; the other two are struck from outside.
    arguments = [
        "stability=clip03,warmdown,lower_lr",
        "stability.lower_lr.factor=1e30",
        "guard.on_nonfinite=raise",
        "share_prefix=false",
        "recipe.log_every=1",
        "n_jobs=2",
        "timeout=75",
        "study=mixed",
    ]
    arguments += ["tracking=mlflow", "tracking.uri=sqlite:///mlflow.db"]
    process = start("train", ["--multirun", *tiny, *SLOW, *arguments], Path.cwd())
    killed = wait_for(lambda: pid_of("mixed", "clip03"), process)
    os.kill(killed, signal.SIGKILL)
    hanging = wait_for(lambda: pid_of("mixed", "warmdown"), process)
    os.kill(hanging, signal.SIGSTOP)
    _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1, err
    seen = states("mixed")
    assert seen["none/0"] == "finished"
    assert seen["lower_lr/0"] == "failed"
    assert seen["clip03/0"] == "killed"
    assert seen["warmdown/0"] == "timed out"
    assert "FloatingPointError" in err
    assert "by signal SIGKILL" in err
    assert "took longer than timeout=75" in err
    log = (folder("mixed", "lower_lr") / "train.log").read_text()
    assert "FloatingPointError" in log
    assert mlflow_states() == {
        "sweep": "FAILED",
        "none": "FINISHED",
        "lower_lr": "FAILED",
        "clip03": "KILLED",
        "warmdown": "KILLED",
    }
    good = folder("mixed", "none") / "record.json"
    before = good.stat().st_mtime_ns
    code, out, err = sweep(tiny, Path.cwd(), *SLOW, *arguments, "timeout=null")
    assert code == 1
    assert states("mixed") == {
        "none/0": "finished",
        "clip03/0": "finished",
        "warmdown/0": "finished",
        "lower_lr/0": "failed",
    }
    assert good.stat().st_mtime_ns == before
    assert "2 finished" in out
    assert "1 skipped, finished before" in out
    ends = {**mlflow_states(), "clip03": "FINISHED", "warmdown": "FINISHED"}
    assert mlflow_states() == ends
    assert ends["sweep"] == "FAILED"


def test_a_second_start_skips_what_is_finished_and_repeats_what_is_not(tiny, template, capsys):
    shutil.copy(template, "mlflow.db")
    arguments = ["--multirun", *tiny, "stability=warmdown,ema", "n_jobs=2", "study=twice"]
    arguments += ["tracking=mlflow", "tracking.uri=sqlite:///mlflow.db"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert set(states("twice").values()) == {"finished"}
    before = {f: f.stat().st_mtime_ns for f in Path("runs/twice").glob("*/seed-*/record.json")}
    assert len(before) == 3
    report = Path("runs/twice/report/report.html")
    assert report.is_file()
    assert str(report) in out
    shared = record(folder("twice", "warmdown"))
    assert shared["derived_from"]["step"] == 7
    assert shared["own_steps"] == 5
    # One run is lost, as if it had been killed before its record.
    lost = folder("twice", "ema")
    (lost / "record.json").unlink()
    assert main([*arguments, "n_jobs=1"]) == 0
    out, err = capsys.readouterr()
    assert "MLflow" not in err
    after = {f: f.stat().st_mtime_ns for f in Path("runs/twice").glob("*/seed-*/record.json")}
    changed = {file for file in after if after[file] != before[file]}
    assert changed == {lost / "record.json"}
    assert "1 finished, 2 skipped" in out
    assert mlflow_states()["sweep"] == "FINISHED"
    assert manifest("twice")["cells"][0]["reason"] == "before"


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_all_jobs_with_a_checkpoint_and_the_same_command_continues(n_jobs, tiny):
    arguments = ["stability=none", "seed=0,1", f"n_jobs={n_jobs}", "study=cut"]
    arguments.append("recipe.max_steps=160")
    slow = ["recipe.log_every=1", "recipe.checkpoint_every=500"]
    process = fork("train", ["--multirun", *tiny, *arguments, *slow], Path.cwd())
    wait_for(lambda: all(pid_of("cut", "none", seed) for seed in range(n_jobs)), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, err
    assert "the same command continues" in out
    assert set(states("cut").values()) <= {"stopped", "finished", "waiting"}
    assert manifest("cut")["status"] == "killed"
    stopped = folder("cut", "none", 0)
    assert record(stopped)["status"] == "killed"
    made = metrics(stopped)[-1]["step"]
    assert 0 < made < 160
    assert main(["--multirun", *tiny, *arguments, *slow]) == 0
    assert [line["step"] for line in metrics(stopped)] == list(range(1, 161))
    whole = train(tiny, "study=whole", "recipe.max_steps=160", *slow)
    assert metrics(whole) == metrics(stopped)


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(tiny):
    arguments = ["stability=none", "study=both", "recipe.max_steps=300"]
    first = start("train", ["--multirun", *tiny, *arguments, "seed=0,1,2"], Path.cwd())
    second = start("train", ["--multirun", *tiny, *arguments, "seed=2,1,0,3"], Path.cwd())
    for process in (first, second):
        _, err = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, err
    records = list(Path("runs/both").glob("*/seed-*/record.json"))
    assert len(records) == 4
    for file in records:
        steps = [line["step"] for line in metrics(file.parent)]
        assert steps == sorted(set(steps))
        assert record(file.parent)["status"] == "finished"


@pytest.mark.slow
def test_the_same_sweep_twice_at_once_is_refused(tiny):
    arguments = ["--multirun", *tiny, "stability=none", "study=same", "recipe.max_steps=2000"]
    first = start("train", arguments, Path.cwd())
    wait_for(lambda: list(Path("runs/same/.sweeps").glob("*.lock")), first)
    second = start("train", arguments, Path.cwd())
    _, err = second.communicate(timeout=WAIT_SECONDS)
    assert second.returncode == 2
    assert "is already running" in err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=WAIT_SECONDS)
    assert first.returncode == 143


def test_a_sweep_whose_parent_is_killed_leaves_no_process_and_loses_little(tiny):
    arguments = ["stability=none", "study=orphan", *SLOW, "recipe.max_steps=20000"]
    arguments += ["recipe.log_every=1", "recipe.checkpoint_every=100"]
    process = start("train", ["--multirun", *tiny, *arguments], Path.cwd())
    child = wait_for(lambda: pid_of("orphan", "none"), process)
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    left = folder("orphan", "none")
    assert record(left)["status"] == "killed"
    assert (left / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_rerun_moves_the_old_runs_aside(tiny):
    arguments = ["stability=none", "study=again"]
    assert sweep(tiny, Path.cwd(), *arguments)[0] == 0
    assert sweep(tiny, Path.cwd(), *arguments, "rerun=true")[0] == 0
    assert len(list(Path("runs/again").glob("*/seed-0*"))) == 2


def job(tmp_path, **changes) -> Job:
    values = {
        "folder": str(tmp_path / "run"),
        "arguments": [],
        "start": None,
        "rerun": False,
        "timeout": None,
        "stop_file": str(tmp_path / "stop"),
        "status_file": str(tmp_path / "status.json"),
        "owner": ["elsewhere", 1],
        "mlflow": False,
    }
    return Job(**(values | changes))


@pytest.mark.parametrize(
    ("key", "begins"), [("right", True), ("of other code", False), (None, False)]
)
def test_a_state_is_used_only_where_its_key_is_the_right_one(key, begins, tmp_path):
    checkpoints = tmp_path / "base" / "checkpoints"
    checkpoints.mkdir(parents=True)
    if key is not None:
        (checkpoints / "state-7.key").write_text(key)
    child = JobProcess(job(tmp_path, start=[str(tmp_path / "base"), 7, "right"]))
    arguments = child._arguments()
    assert any(a.startswith("fork=") for a in arguments) is begins
    assert ("started from step 0" in child.status["reason"]) is not begins


def test_a_job_whose_sweep_has_ended_does_not_begin(tmp_path):
    (tmp_path / "stop").write_text("SIGTERM")
    assert JobProcess(job(tmp_path)).run() == "stopped"
    assert not (tmp_path / "run").exists()


def test_a_job_tells_why_it_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert JobProcess(job(tmp_path, arguments=["recipe.max_steps=0"])).run() == "failed"
    status = json.loads((tmp_path / "status.json").read_text())
    assert "recipe.max_steps=0: must be at least 1" in status["reason"]
