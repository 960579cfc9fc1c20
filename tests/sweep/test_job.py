"""What a job of a sweep tells of itself."""

import json
import time

from src.sweep.job import Job, JobProcess


def test_a_job_ends_after_it_began_though_the_clock_has_jumped_back(tmp_path, monkeypatch):
    file = tmp_path / "status.json"
    job = Job(
        folder=str(tmp_path),
        arguments=[],
        start=None,
        rerun=False,
        timeout=None,
        stop_file=str(tmp_path / "stop"),
        status_file=str(file),
        owner=["host", 1],
        mlflow=False,
    )
    child = JobProcess(job)
    child.status["started"] = time.time()
    monkeypatch.setattr(time, "time", lambda: child.status["started"] - 3600.0)
    child._end("finished", "")
    status = json.loads(file.read_text())
    assert 0 <= status["ended"] - status["started"] < 60
