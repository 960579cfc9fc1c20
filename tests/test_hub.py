"""The hub, which no test reaches."""

import pytest

from src.conversion.source import read_source
from src.errors import InputError
from tests.conversion.llamas import folder

ID = "HuggingFaceTB/SmolLM2-135M"


def unreachable(*args, **kwargs):
    raise TimeoutError("no network")


def test_without_a_network_a_models_id_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"source=HuggingFaceTB/SmolLM2-135M: .*make smollm2"):
        read_source(ID, weights="raw")


def test_what_the_hub_refuses_is_said_and_no_older_copy_is_taken(monkeypatch):
    def refuse(repository, *, local_files_only, **given):
        assert not local_files_only
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr("src.hub._has_network", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"the hub did not give it \(401 Client Error\)"):
        read_source(ID, weights="raw")


def test_a_model_that_was_fetched_before_is_read_without_a_network(monkeypatch, tmp_path):
    source = folder(tmp_path / "snapshot")
    asked = []

    def snapshot(repository, **given):
        asked.append((repository, given))
        return str(source)

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = read_source(ID, weights="raw")
    ((repository, given),) = asked
    assert repository == ID and given["local_files_only"]
    assert model.choices["model"] == "SmolLM2-135M"


def test_with_a_network_only_what_is_read_is_fetched(monkeypatch, tmp_path):
    source = folder(tmp_path / "snapshot")
    asked = {}

    class Connection:
        def close(self):
            pass

    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: Connection())
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, **given: asked.update(given) or str(source)
    )
    read_source(ID, weights="raw")
    patterns = asked["allow_patterns"]
    assert not asked["local_files_only"]
    assert "config.json" in patterns and "*.safetensors" in patterns
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)
