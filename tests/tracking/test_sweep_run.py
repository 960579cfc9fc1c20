import math
import threading

import filelock
import pytest

from src.tracking import sweep_run as parents
from src.tracking.client import Server
from src.tracking.labels import PARENT
from src.tracking.new_state import begin
from src.tracking.push import push
from src.tracking.stale_runs import close_run
from src.tracking.sweep_run import SweepRun, lock_file
from tests.tracking.folders import make_run, name_of, query, run_ids, runs, tags, write_record


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Server(f"sqlite:///{database}")


@pytest.fixture
def sweep(server, tmp_path):
    """Makes the run of a sweep of study a anew, as another process of the same sweep would."""
    folder = tmp_path / "runs" / "a" / ".sweeps"
    folder.mkdir(parents=True)
    held = {}
    warned = []

    def make(sweep_id="s1"):
        lock = held.setdefault(sweep_id, filelock.FileLock(lock_file(folder, sweep_id)))
        lock.acquire()
        made = SweepRun(
            uri=server.uri, experiment="a", sweep_id=sweep_id, folder=folder, warn=warned.append
        )
        made.warned, made.lock = warned, lock
        return made

    yield make
    for lock in held.values():
        lock.release(force=True)


def test_a_sweep_has_one_run_with_report_and_headline_however_often_it_runs(
    sweep, database, tmp_path
):
    one = sweep()
    run_id = one.open(command="python -m src.train -m seed=1,2", description="why")
    assert runs(database) == {"sweep s1": "RUNNING"}
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.svg").touch()
    report = tmp_path / "report.md"
    report.write_text("first")
    figures = {"ema/difference": 2.0, "nothing": math.nan}
    files = [report, tmp_path / "figures"]
    one.close("FAILED", metrics=figures, artifacts=files, tags={"status": "failed", "failed": "1"})
    assert runs(database) == {"sweep s1": "FAILED"}
    two = sweep()
    assert two.open(command="python -m src.train -m seed=1,2", description="why") == run_id
    assert runs(database) == {"sweep s1": "RUNNING"}
    report.write_text("second")
    two.close("FINISHED", metrics={"ema/difference": 1.0}, artifacts=files, tags={"status": "ok"})
    assert runs(database) == {"sweep s1": "FINISHED"}
    known = tags(database, "sweep s1")
    assert (known["kind"], known["sweep_id"], known["status"]) == ("sweep", "s1", "ok")
    assert known["command"] == "python -m src.train -m seed=1,2"
    assert known["mlflow.note.content"] == "why"
    assert PARENT not in known
    # The later figure, though the smaller one.
    assert query(database, "select key, value from latest_metrics") == [("ema/difference", 1.0)]
    uploaded = database.parent.glob("mlartifacts/**/report/**/*")
    texts = {path.name: path.read_text() for path in uploaded if path.is_file()}
    assert texts == {"report.md": "second", "loss.svg": ""}
    assert two.warned == []


def test_children_stand_below_it_and_finished_ones_are_adopted(sweep, server, database):
    folder = make_run("study=a")
    begin(folder, server.uri, facts={}, parent_run_id="of an earlier sweep")
    push(folder, server, over=True)
    local = make_run("study=a", "seed=1")
    parent = sweep()
    run_id = parent.open(command="...")
    for child in (folder, local):
        parent.adopt(child)
        known = tags(database, name_of(child))
        assert (known[PARENT], known["sweep_id"]) == (run_id, "s1")
    assert runs(database)[name_of(folder)] == "FINISHED"
    parent.close("FINISHED")


def test_a_server_that_is_away_stops_no_sweep_and_gets_parent_and_children_later(
    sweep, server, database, monkeypatch
):
    parent = sweep()
    connect = Server.client.fget
    away = threading.Event()
    away.set()

    asked = []

    def client(self):
        asked.append(self.uri)
        if away.is_set():
            raise ConnectionError("away")
        return connect(self)

    monkeypatch.setattr(Server, "client", property(client))
    assert parent.open(command="...") is None
    done = make_run("study=a", "seed=1")
    before = len(asked)
    parent.adopt(done)
    # Of many cells, none asks a server that may take its time not to answer.
    assert len(asked) == before
    assert len(parent.warned) == 1
    assert parent.warned[0].startswith(f"MLflow at {server.uri} cannot be reached")
    assert "python -m src.sync" in parent.warned[0]
    # The server is back when the second child runs, which no parent was named to.
    away.clear()
    child = make_run("study=a", "tracking.sweep_id=s1")
    begin(child, server.uri, facts={}, parent_run_id=None)
    push(child, server, over=True)
    assert PARENT not in tags(database, name_of(child))
    parent.close("FINISHED", metrics={"x": 1.0})
    assert set(runs(database).values()) == {"FINISHED"}
    for folder in (child, done):
        assert tags(database, name_of(folder))[PARENT] == run_ids(database)["sweep s1"]
    assert len(parent.warned) == 1


def test_a_server_that_hangs_holds_no_sweep_up(sweep, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(Server, "client", property(lambda self: hanging.wait(60)))
    monkeypatch.setattr(parents, "OPEN_SECONDS", 0.2)
    parent = sweep()
    assert parent.open(command="...") is None
    assert "no answer within" in parent.warned[0]
    hanging.set()


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_child_that_died_is_closed_for_it(server, database, status):
    folder = make_run("study=a", status=None)
    begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=False)
    with filelock.FileLock(folder / ".lock"):
        close_run(folder, status)
        assert runs(database) == {name_of(folder): "RUNNING"}
    close_run(folder, status)
    assert runs(database) == {name_of(folder): status}
    assert tags(database, name_of(folder))["status"] == status.lower()
    assert "mended" not in tags(database, name_of(folder))
    # Once known, it is not said otherwise.
    close_run(folder, "FAILED" if status == "KILLED" else "KILLED")
    assert not push(folder, server, over=True)
    assert runs(database) == {name_of(folder): status}


def test_the_record_of_a_child_is_believed_first(server, database):
    folder = make_run("study=a", status=None)
    begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=False)
    write_record(folder, status="finished")
    close_run(folder, "FAILED")
    assert runs(database) == {name_of(folder): "FINISHED"}


def test_a_child_that_never_was_in_mlflow_is_left_alone(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run("study=a", status=None)
    close_run(folder, "KILLED")
    assert not (folder / "mlflow.json").exists()


def test_a_sweep_that_died_is_mended_by_the_next_one_and_a_living_one_is_not(sweep, database):
    first = sweep("s1")
    first.open(command="...")
    sweep("s2").open(command="...")
    assert runs(database) == {"sweep s1": "RUNNING", "sweep s2": "RUNNING"}
    first.lock.release(force=True)
    sweep("s3").open(command="...")
    assert runs(database) == {"sweep s1": "KILLED", "sweep s2": "RUNNING", "sweep s3": "RUNNING"}
    known = tags(database, "sweep s1")
    assert (known["status"], known["mended"]) == ("killed", "true")
