"""MLflow's pages, as a user starts and stops them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from src import ui
from src.common.tracking_address import fingerprint
from src.study import before_serving, serve_pages
from src.tracking import pages
from tests.runs import ROOT, free_port, start


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_pages_without_a_traceback(number, database, tmp_path):
    port = free_port()
    process = start("ui", [f"port={port}"], tmp_path, MLFLOW_TRACKING_URI="")
    while not answers(port):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert f"all studies: http://127.0.0.1:{port}" in out
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert "error: interrupted" in err
    assert not answers(port)


def test_open_shows_the_comparison_in_the_browser_once_the_server_answers(monkeypatch):
    opened = []
    monkeypatch.setattr(serve_pages.webbrowser, "open", opened.append)
    answered = iter([OSError("not yet"), contextlib.nullcontext()])

    def answer(*_, **__):
        found = next(answered)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(serve_pages.urllib.request, "urlopen", answer)
    monkeypatch.setattr(serve_pages.time, "sleep", lambda _: None)
    serve_pages._open("http://127.0.0.1:5000", "http://127.0.0.1:5000/compare/a")
    assert opened == ["http://127.0.0.1:5000/compare/a"]


def test_open_takes_true_or_false_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ui.main(["open=perhaps"]) == 2
    assert "open=perhaps: must be true or false" in capsys.readouterr().err


@pytest.fixture
def listening():
    """The number of a port that a program of another kind has."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize(("level", "field"), [(None, "port"), ("1", "PORT")])
def test_a_taken_port_is_answered_at_once(level, field, listening, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "MAKELEVEL"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "src.ui", f"port={listening}"],
        cwd=tmp_path,
        env=env | ({} if level is None else {"MAKELEVEL": level}) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2
    (line,) = lines
    assert re.fullmatch(rf"error: port={listening}: is taken; type {field}=\d+", line)
    assert f"{field}={listening}" != line.rpartition(" ")[2]
    assert "| mlflow\n" not in done.stderr


def test_pages_that_run_already_are_named(database, tmp_path, monkeypatch, capsys, listening):
    monkeypatch.chdir(tmp_path)
    served = fingerprint("sqlite:///mlflow.db")
    monkeypatch.setattr(before_serving, "_database_at", lambda root: served)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert ui.main([f"port={listening}"]) == 0
    out = capsys.readouterr().out
    assert f"already running: http://127.0.0.1:{listening}" in out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///another.db")
    assert ui.main([f"port={listening}"]) == 2


def test_a_server_of_ours_answers_with_its_database(monkeypatch):
    monkeypatch.setenv(pages.STORE, "sqlite:///mlflow.db")
    assert pages.served(None).body.decode() == fingerprint("sqlite:///mlflow.db")
    assert fingerprint("sqlite:///mlflow.db") == fingerprint(
        f"sqlite:///{Path('mlflow.db').resolve()}"
    )


def test_without_runs_it_says_how_to_make_one_and_a_study_must_have_some(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve_pages, "ui", lambda fields: 0)
    assert ui.main([f"port={free_port()}"]) == 0
    assert "there are no runs in runs yet; type make train" in capsys.readouterr().out
    assert ui.main([f"port={free_port()}", "study=nope"]) == 2
    assert "study=nope: has no runs in runs (allowed: none yet" in capsys.readouterr().err
