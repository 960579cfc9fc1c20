"""The thread of a run, against a server of our own making."""

import threading

import pytest

from src.tracking import follow as mirrors
from src.tracking.follow import MlflowMirror
from tests.tracking.folders import make_run

URI = "http://somebody:secret@127.0.0.1:9"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A mirror whose deliveries are what `answer` does; the thread asks in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirrors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirrors, "MAX_POLL_SECONDS", 0.02)
    monkeypatch.setattr(mirrors, "close_stale_runs", lambda *_: [])
    monkeypatch.setattr(mirrors, "catch_up", lambda *_, **__: None)

    def make(answer):
        monkeypatch.setattr(mirrors, "push", answer)
        warned = []
        mirror = MlflowMirror(
            make_run("study=a", status=None),
            uri=URI,
            device={},
            parent_run_id=None,
            warn=warned.append,
        )
        mirror.warned = warned
        return mirror

    return make


def test_a_server_that_comes_back_is_tried_until_it_answers_and_warned_of_once(run):
    seen, back = [], threading.Event()

    def answer(folder, server, *, over):
        seen.append(over)
        if len(seen) < 4:
            raise ConnectionError("no\nanswer")
        back.set()

    mirror = run(answer)
    mirror.start()
    assert back.wait(600)
    mirror.finish()
    assert seen[:4] == [False] * 4
    assert seen[-1] and not any(seen[:-1])
    assert mirror.warned == [
        "MLflow at http://127.0.0.1:9 cannot be reached or written (no);"
        " nothing is lost: python -m src.sync sends the rest later"
    ]


def test_a_server_that_stays_away_costs_one_last_try(run):
    seen = []

    def answer(folder, server, *, over):
        seen.append(over)
        raise ConnectionError("no")

    mirror = run(answer)
    mirror.start()
    mirror.finish()
    assert seen.count(True) == 1
    assert len(mirror.warned) == 1


def test_a_server_that_hangs_at_the_end_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(mirrors, "FINISH_SECONDS", 0.2)
    hanging = threading.Event()
    mirror = run(lambda *_, **__: hanging.wait(60))
    mirror.start()
    mirror.finish()
    hanging.set()
    # Before the test's patches are gone.
    mirror._thread.join()
    assert "did not accept everything in time" in mirror.warned[0]


def test_trouble_with_earlier_runs_is_not_this_run_s(run, monkeypatch):
    def catch_up(*_, **__):
        raise ValueError("damaged")

    monkeypatch.setattr(mirrors, "catch_up", catch_up)
    mirror = run(lambda *_, **__: None)
    mirror.start()
    mirror.finish()
    assert mirror.warned == []


def test_all_that_a_delivery_needs_is_on_disk_before_a_server_is_asked(run):
    found = []
    mirror = run(lambda folder, *_, **__: found.append((folder / "mlflow.json").read_text()))
    mirror.start()
    mirror.finish()
    assert '"run_id": null' in found[0]
    assert '"experiment": "a"' in found[0]
