"""A password that is given in an address goes to the server it is for, and nowhere else."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
import yaml

from src import ui
from src.common import tracking_address
from src.common.errors import InputError
from src.common.tracking_address import (
    default_uri,
    masked,
    take,
    take_typed,
    with_secrets,
    without_secrets,
)
from src.sweep import settings
from src.sweep.settings import compose_sweep
from src.sync import main as sync
from src.tracking.client import Server
from src.tracking.new_state import begin
from src.tracking.push import push
from src.tracking.push_state import read_state, state_file
from src.train import main as train
from tests.conftest import TINY
from tests.runs import start
from tests.tracking.folders import make_run, runs
from tests.tracking.guarded import PASSWORD, SECRETS, USER, GuardedServer
from tests.tracking.server import MlflowServer
from tests.tracking.waiting import WITH_MLFLOW, until

DEAD = "127.0.0.1:9"
DATABASE = f"mysql+pymysql://{USER}:{PASSWORD}@{DEAD}/runs?password={PASSWORD}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without an address, or a password, of the machine's own; what a test sets is undone."""
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    monkeypatch.setenv(tracking_address.VARIABLE, "")


@pytest.fixture
def guarded():
    server = GuardedServer()
    yield server
    server.stop()


def holding_secrets(folder: Path, *texts: str) -> list[str]:
    """Files, and texts, in which a secret stands."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(f) for f in files if any(s.encode() in f.read_bytes() for s in SECRETS)]
    return found + [text for text in texts if any(secret in text for secret in SECRETS)]


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://h:1", "http://h:1"),
        ("http://u:p@h:1/a", "http://h:1/a"),
        ("https://token@h", "https://h"),
        ("http://h?token=p", "http://h"),
        ("http://h/a#p", "http://h/a"),
        ("http://u:p@q@h", "http://h"),
        ("http://u:p/q@h", "http://h"),
        ("http://u:p?q@h", "http://h"),
        ("postgresql://u:p@h:5/d?sslpassword=p", "postgresql://h:5/d"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dp", "mssql+pyodbc:///"),
        ("sqlite+pysqlcipher://:p@/x.db", "sqlite+pysqlcipher:///x.db"),
        ("sqlite:////a/b@c?d/x.db", "sqlite:////a/b@c?d/x.db"),
        ("file:///a@b", "file:///a@b"),
        ("mlruns", "mlruns"),
    ],
)
def test_an_address_without_its_secrets(uri, clean):
    assert without_secrets(uri) == clean
    assert without_secrets(clean) == clean


def test_the_secret_of_an_address_is_known_to_this_process_and_for_this_address_alone():
    assert take(f"http://u:p@{DEAD}") == f"http://{DEAD}"
    assert with_secrets(f"http://{DEAD}") == f"http://u:p@{DEAD}"
    assert with_secrets("http://another") == "http://another"
    assert default_uri() == f"http://{DEAD}"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://h?token=p", "http://h: the address of a server must end before the ?"),
        ("HTTP://h?token=p", "HTTP://h: the address of a server must end before the ?"),
        ("http://u:p/q@h", "http://h: a user or password in an address must have / ? # @ \\ wr"),
        ("http://u:p\\q@h", "http://h: a user or password in an address must have / ? # @ \\ w"),
        ("databricks://u:p@h", "databricks://h: a Databricks address takes no user"),
    ],
)
def test_an_address_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, uri, said
):
    monkeypatch.chdir(tmp_path)
    for command in (train, sync):
        assert command([f"tracking.uri={uri}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: tracking.uri={said}")
    monkeypatch.setenv(tracking_address.VARIABLE, uri)
    assert train(WITH_MLFLOW) == 2
    assert capsys.readouterr().err.startswith(f"error: {tracking_address.VARIABLE}={said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_typed_address_is_cleaned_however_it_is_written(quote, sign):
    typed = f"{sign}tracking.uri={quote}http://u:p@h{quote}"
    assert take_typed(typed) == f"{sign}tracking.uri={quote}http://h{quote}"
    assert os.environ[tracking_address.VARIABLE] == "http://u:p@h"


def test_an_address_in_a_form_that_could_hide_a_secret_is_refused():
    with pytest.raises(InputError) as error:
        take_typed("tracking.uri=choice('http://u:pw@h')")
    assert "pw" not in str(error.value)


def test_messages_name_no_secret_where_an_address_is_typed_into_another_field(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    uri = f"http://{USER}:{PASSWORD}@{DEAD}?token={PASSWORD}"
    for argument in (f"tracking.url={uri}", f"trakcing={uri}", f"study={uri}", f"seed={uri}", uri):
        assert train([argument]) == 2
        assert sync([argument]) == 2
    secret = f"{USER}:{PASSWORD}@{DEAD}"
    mistyped = ["tracking.uri={}", "tracking.uri=http:/{}", "tracking.uri=//{}"]
    for form in (*mistyped, "tracking=http://{}", "tracking={{uri:'http://{}'}}"):
        assert train([form.format(secret)]) == 2
        assert train(["--multirun", "seed=0,1", form.format(secret)]) == 2
    for command in (train, sync):
        assert command([f"tracking.uri=sqlite:///x.db?token={PASSWORD}"]) == 2
    out, err = capfd.readouterr()
    assert holding_secrets(tmp_path, out, err) == []


def test_a_text_keeps_what_is_no_secret():
    text = "http://127.0.0.1:5000/#/compare-runs and runs/a/x@fork-3/seed-0 and me@host"
    assert masked(text) == text


def test_an_address_out_of_another_variable_is_cleaned_too(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ELSEWHERE", f"http://{USER}:{PASSWORD}@{DEAD}")
    assert train([*tiny, "tracking=mlflow", "tracking.uri=${oc.env:ELSEWHERE}"]) == 0
    (config,) = tmp_path.glob("runs/**/config.yaml")
    assert yaml.safe_load(config.read_text())["tracking"]["uri"] == f"http://{DEAD}"
    assert holding_secrets(tmp_path, *capfd.readouterr()) == []


def test_an_address_in_the_file_of_an_experiment_is_cleaned_too(monkeypatch):
    def with_address(arguments):
        composed = compose_sweep(arguments)
        composed.hydra.sweeper.params = {"tracking.uri": f"http://{USER}:{PASSWORD}@{DEAD}"}
        return composed

    monkeypatch.setattr(settings, "compose_sweep", with_address)
    assert settings.compose_settings([]).axes == [f"tracking.uri='http://{DEAD}'"]
    assert with_secrets(f"http://{DEAD}") == f"http://{USER}:{PASSWORD}@{DEAD}"


@pytest.mark.parametrize("uri", [f"http://{USER}:{PASSWORD}@{DEAD}", DATABASE])
def test_a_run_leaves_no_secret_anywhere(tiny, tmp_path, capfd, uri):
    assert train([*tiny, "tracking=mlflow", f"tracking.uri={uri}", "save_at=[8]"]) == 0
    trained, warned = capfd.readouterr()
    assert warned.startswith(f"warning: MLflow at {without_secrets(uri)} cannot be reached")
    assert warned.count("\n") == 1
    (made,) = tmp_path.glob("runs/**/record.json")
    assert json.loads(made.read_text())["status"] == "finished"
    assert sync([]) == 1
    out, err = capfd.readouterr()
    assert f"MLflow at {without_secrets(uri)} cannot be reached" in err
    assert holding_secrets(tmp_path, trained, warned, out, err) == []
    assert len(list(tmp_path.glob("runs/**/mlflow.json"))) == 1


@pytest.mark.parametrize("way", ["typed", "address in the environment", "own variables"])
def test_a_server_that_wants_a_password_gets_it(guarded, tmp_path, monkeypatch, capsys, way):
    monkeypatch.chdir(tmp_path)
    make_run("study=a")
    uri = f"http://{guarded.place}"
    secret = f"http://{USER}:{PASSWORD}@{guarded.place}"
    if way == "address in the environment":
        monkeypatch.setenv(tracking_address.VARIABLE, secret)
    elif way == "own variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pl4nted w0rd")
    else:
        uri = secret
    assert Server(take(uri)).connection_error() is None
    assert (guarded.num_let_in, guarded.num_refused) == (1, 0)


def test_a_password_that_is_missing_is_asked_for_in_one_line(
    guarded, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = make_run("study=a")
    begin(folder, f"http://{guarded.place}", facts={}, parent_run_id=None)
    assert sync([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: MLflow at http://{guarded.place} cannot be reached")
    assert tracking_address.ADVICE in err
    assert err.count("\n") == 1
    assert guarded.num_let_in == 0


def test_a_folder_of_an_earlier_version_is_delivered_and_its_secret_is_not(
    database, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    server = Server(f"sqlite:///{database}")
    folder = make_run("study=a")
    begin(folder, server.uri, facts={}, parent_run_id=None)
    config, state = folder / "config.yaml", folder / "mlflow.json"
    config.write_text(
        config.read_text().replace("uri: null", f"uri: http://{USER}:{PASSWORD}@{DEAD}")
    )
    state.write_text(state.read_text().replace(server.uri, f"http://{USER}:{PASSWORD}@{DEAD}/one"))
    assert state_file(folder, f"http://{DEAD}/one") == state
    assert read_state(state).uri == f"http://{DEAD}/one"
    begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=True)
    assert holding_secrets(tmp_path / "mlartifacts") == []
    assert f"http://{DEAD}" in next(tmp_path.glob("mlartifacts/**/config.yaml")).read_text()


def command_lines(process, folder: Path) -> list[str]:
    """Of all other processes that work in a folder, as everyone on the machine can read them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # A process may end at any moment.
        with contextlib.suppress(OSError):
            if int(entry.name) != process.pid and (entry / "cwd").resolve() == folder:
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
    return found


def watched(process, folder: Path) -> tuple[str, str, list[str]]:
    """What a process says until its end, and the command lines of all that it starts."""
    seen: list[str] = []
    until_end = time.monotonic() + 900
    while process.poll() is None:
        assert time.monotonic() < until_end
        seen += command_lines(process, folder)
        time.sleep(0.1)
    out, err = process.communicate()
    return out, err, seen


@pytest.mark.slow
@pytest.mark.parametrize("way", ["typed", "environment"])
@pytest.mark.parametrize("uri", [f"http://{USER}:{PASSWORD}@{DEAD}", DATABASE])
@pytest.mark.parametrize(
    "command", [("train", *TINY), ("train", "--multirun", "seed=0,1", *TINY), ("sync",)], ids=str
)
def test_no_command_leaves_a_secret_anywhere(tmp_path, command, uri, way):
    name, *arguments = command
    if name == "train":
        arguments += ["tracking=mlflow"]
    if way == "typed":
        arguments += [f"tracking.uri={uri}"]
    given = {tracking_address.VARIABLE: uri} if way == "environment" else {}
    (tmp_path / "runs").mkdir()
    out, err, seen = watched(start(name, arguments, tmp_path, **given), tmp_path)
    assert "Traceback" not in err
    assert holding_secrets(tmp_path, out, err, *seen) == []


@pytest.mark.parametrize("way", ["typed", "environment"])
def test_ui_gives_a_server_the_database_with_its_password_and_nobody_else(
    tmp_path, monkeypatch, way
):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(Server, "connection_error", lambda self: None)
    if way == "environment":
        monkeypatch.setenv(tracking_address.VARIABLE, DATABASE)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")
    ui.main([f"tracking.uri={DATABASE}"] if way == "typed" else [])
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == DATABASE
    assert not any(secret in str(started) for secret in SECRETS)


@pytest.mark.slow
def test_a_sweep_reaches_a_server_with_a_password_and_keeps_it_to_itself(database, tmp_path):
    real = MlflowServer(database)
    real.start()
    until(real.answers)
    guarded = GuardedServer(real.uri)
    try:
        arguments = [*WITH_MLFLOW, "--multirun", "seed=0,1", "n_jobs=2", "study=a"]
        uri = f"tracking.uri=http://{USER}:{PASSWORD}@{guarded.place}"
        process = start("train", [*arguments, uri], tmp_path)
        out, err, seen = watched(process, tmp_path)
        assert process.returncode == 0
        # A report may say that the checkout has uncommitted changes.
        assert "MLflow" not in err
        assert seen
        assert set(runs(database).values()) == {"FINISHED"}
        assert len(runs(database)) == 3
        assert guarded.num_refused == 0
        assert holding_secrets(tmp_path, out, err, *seen) == []
    finally:
        guarded.stop()
        real.stop()
