"""The making of MLflow's database, which takes seconds in which anything may end it."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import mlflow.store.db.utils as mlflow_database
import pytest
import sqlalchemy

from src import ui
from src.study import serve_pages
from src.tracking import database as databases
from src.tracking.client import Server, one_line
from tests.runs import ROOT


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a database is to be, with nothing there yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mlflow.db"


@pytest.fixture
def quick(place, template, monkeypatch):
    """The same; making a database takes no time, and no file changes by itself."""
    monkeypatch.setattr(databases, "_create", lambda made: shutil.copy(template, made))
    monkeypatch.setattr(databases, "STILL_SECONDS", 0.0)
    return place


def execute(database, *statements):
    with closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), "full"])
def test_a_making_that_fails_half_way_leaves_nothing_in_the_way_of_the_next(
    place, monkeypatch, error
):
    if error == "full":
        full = sqlite3.OperationalError("database or disk is full")
        error = sqlalchemy.exc.OperationalError("create table", {}, full)

    def upgrade(engine):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_database, "_upgrade_db", upgrade)
        silence = Server(f"sqlite:///{place}").connection_error()
    assert one_line(silence).endswith(("No space left on device", "database or disk is full"))
    assert {file.name for file in place.parent.iterdir()} == {"mlflow.lock"}
    assert Server(f"sqlite:///{place}").connection_error() is None
    assert {file.name for file in place.parent.iterdir()} == {"mlflow.lock", "mlflow.db"}


HALF_MADE = {
    "empty": [],
    "first table": ["create table experiments (id)"],
    "some tables": ["create table experiments (id)", "create table runs (id)"],
    "in a migration": ["create table _alembic_tmp_experiments (id)", "create table runs (id)"],
}


@pytest.mark.parametrize("statements", HALF_MADE.values(), ids=HALF_MADE)
def test_a_half_made_database_is_moved_aside_and_told_in_one_line(quick, capsys, statements):
    quick.touch()
    execute(quick, *statements)
    size = quick.stat().st_size
    # SQLite would roll it back into the new database.
    quick.with_name("mlflow.db-journal").write_bytes(b"left by the one before")
    assert Server(f"sqlite:///{quick}").connection_error() is None
    (aside,) = quick.parent.glob("mlflow.db.half-made-*")
    assert aside.stat().st_size == size
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {quick}: is incomplete and holds no run; it was renamed to")
    assert err.count("\n") == 1
    assert Server(f"sqlite:///{quick}").connection_error() is None
    assert capsys.readouterr().err == ""


def test_a_database_with_runs_or_of_another_program_stays_where_it_is(quick, capsys):
    experiment = ["create table experiments (id)", "insert into experiments values (0)"]
    upgraded = [*experiment, "create table _alembic_tmp_experiments (id)"]
    for number, statements in enumerate((experiment, upgraded, ["create table songs (id)"])):
        database = quick.with_name(f"{number}.db")
        execute(database, *statements)
        databases.ensure_database(database)
    assert not list(quick.parent.glob("*half-made*"))
    assert capsys.readouterr().err == ""


def test_a_database_that_another_program_is_making_is_waited_for(quick, monkeypatch):
    monkeypatch.setattr(databases, "STILL_SECONDS", 20.0)
    execute(quick, "create table experiments (id)")
    later = threading.Timer(0.5, execute, (quick, "insert into experiments values (0)"))
    later.start()
    databases.ensure_database(quick)
    later.join()
    assert not list(quick.parent.glob("*half-made*"))


def test_a_locked_database_is_told_soon_and_left_alone(quick, template, monkeypatch, capfd):
    monkeypatch.setattr(databases, "BUSY_SECONDS", 0.1)
    shutil.copy(template, quick)
    server = Server(f"sqlite:///{quick}")
    with closing(sqlite3.connect(quick)) as other:
        other.execute("begin exclusive")
        begun = time.monotonic()
        assert one_line(server.connection_error()) == "database is locked"
        assert time.monotonic() - begun < 10
    assert capfd.readouterr().err == ""
    assert server.connection_error() is None


def test_ui_makes_the_database_before_mlflow_s_server_does(quick, monkeypatch):
    started = []

    def serve(command):
        started.append(quick.exists())
        return 0

    monkeypatch.setattr(serve_pages, "run_bound", serve)
    assert ui.main([]) == 0
    assert started == [True]


def test_ui_without_a_database_that_can_be_made_is_one_line(quick, monkeypatch, capsys):
    def make(database):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(databases, "_create", make)
    assert ui.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: MLflow at sqlite:///{quick} cannot be reached or written")
    assert err.count("\n") == 1


_KILLS = """
import contextlib, os, signal, sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from src.tracking import database as databases
from src.tracking.client import Server

folder, whole = Path(sys.argv[1]), int(sys.argv[2])
databases.STILL_SECONDS = 0.0

def size(folder):
    total = 0
    for file in folder.rglob("mlflow.db*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total

for moment in range(12):
    place = folder / str(moment) / "mlflow.db"
    place.parent.mkdir()
    child = os.fork()
    if child == 0:
        Server(f"sqlite:///{place}").connection_error()
        os._exit(1)
    while size(place.parent) < moment * whole // 13:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
    child = os.fork()
    if child == 0:
        os._exit(int(Server(f"sqlite:///{place}").connection_error() is not None))
    print(moment, os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_making_leaves_a_place_that_the_next_run_uses(
    template, tmp_path
):
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, str(tmp_path), str(template.stat().st_size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout.splitlines() == [f"{moment} 0" for moment in range(12)], done.stderr
