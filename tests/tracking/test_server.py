"""A real tracking server that goes away in the middle of a run."""

import pytest

from tests.runs import record, start
from tests.tracking.folders import name_of, points, points_on_disk, runs, tags
from tests.tracking.server import MlflowServer
from tests.tracking.waiting import PATIENCE_SECONDS, start_waiting, until


@pytest.fixture
def server(database):
    server = MlflowServer(database)
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_stopped_in_the_middle_of_a_run_loses_no_metric(server, tmp_path):
    server.start()
    until(server.answers)
    run = start_waiting(["study=a"], tmp_path, MLFLOW_TRACKING_URI=server.uri)
    until(lambda: any(points(server.database, name) for name in runs(server.database)))
    (folder,) = (tmp_path / "runs" / "a").glob("*/seed-0")
    name = name_of(folder)
    assert runs(server.database) == {name: "RUNNING"}
    server.stop()
    until(lambda: "cannot be reached" in (folder / "train.log").read_text())
    assert run.poll() is None
    (tmp_path / "go").touch()
    _, warning = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 0
    assert warning.startswith(f"warning: MLflow at {server.uri} cannot be reached")
    assert "python -m src.sync" in warning
    assert warning.count("\n") == 1
    assert record(folder)["status"] == "finished"
    stored = points(server.database, name)
    assert stored
    assert stored < points_on_disk(folder)
    assert runs(server.database) == {name: "RUNNING"}

    server.start()
    until(server.answers)
    sync = start("sync", [], tmp_path)
    out, err = sync.communicate(timeout=PATIENCE_SECONDS)
    assert (sync.returncode, err) == (0, "")
    assert out.endswith("1 run brought up to date, 0 already up to date\n")
    assert points(server.database, name) == points_on_disk(folder)
    assert runs(server.database) == {name: "FINISHED"}
    assert tags(server.database, name)["outcome"] == "clean"
    uploaded = {path.name for path in tmp_path.glob("mlartifacts/**/*") if path.is_file()}
    assert uploaded == {"config.yaml", "record.json", "samples.md"}
