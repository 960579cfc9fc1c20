import socket

import pytest

from src.common.tracking_address import default_uri
from src.tracking.client import Server, one_line


def test_a_database_means_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Server(default_uri()).uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert Server(f"sqlite:///{tmp_path}/x.db").uri == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert Server(default_uri()).uri == "http://127.0.0.1:9"


def test_a_reason_takes_one_line():
    refused = Server("http://127.0.0.1:9").connection_error()
    assert one_line(refused) == "Connection refused"
    assert one_line(ValueError("a\nb")) == "a"
    assert one_line(ValueError()) == "ValueError"


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        silent = Server(f"http://127.0.0.1:{listening.getsockname()[1]}").connection_error()
    assert one_line(silent) == "timed out"


def test_a_password_in_an_address_is_not_shown():
    line = Server("http://me:secret@host:1").trouble(ValueError("no"))
    assert line == "MLflow at http://host:1 cannot be reached or written (no)"


def test_a_database_in_no_folder_is_an_error_at_once(tmp_path):
    silence = Server(f"sqlite:///{tmp_path}/nowhere/x.db").connection_error()
    assert one_line(silence) == f"{tmp_path}/nowhere: no such folder"


def test_an_experiment_made_by_another_process_meanwhile_is_taken(database, monkeypatch):
    server = Server(f"sqlite:///{database}")
    first = server.experiment_id("a")
    look = server.client.get_experiment_by_name
    seen = []

    def not_yet(name):
        seen.append(name)
        return None if len(seen) == 1 else look(name)

    monkeypatch.setattr(server.client, "get_experiment_by_name", not_yet)
    assert server.experiment_id("a") == first
    assert len(seen) == 2


@pytest.mark.parametrize("num_entries", [1, 2500])
def test_batches_are_as_large_as_mlflow_takes_them(database, num_entries):
    server = Server(f"sqlite:///{database}")
    run_id = server.client.create_run(server.experiment_id("a")).info.run_id
    names = [f"name_{number}" for number in range(num_entries)]
    server.log(
        run_id,
        metrics=[(name, 1.0, 5, 0) for name in names],
        params=dict.fromkeys(names[:250], "x" * 7000),
        tags=dict.fromkeys(names[:250], "x" * 9000),
    )
    data = server.client.get_run(run_id).data
    assert data.metrics.keys() == set(names)
    assert set(data.params.values()) == {"x" * 6000}
    assert data.tags["name_0"] == "x" * 8000
