"""MLflow's pages, as a user starts and stops them."""

import contextlib
import signal
import time
import urllib.request

import pytest

from src import ui
from src.study import serve_pages
from tests.runs import free_port, start


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
