"""The hub, which no test reaches."""

import pytest

from src.common.errors import InputError
from src.conversion.source import read_source
from tests.conversion.llamas import folder

ID = "HuggingFaceTB/SmolLM2-135M"


def unreachable(*args, **kwargs):
    raise TimeoutError("no network")


class Connection:
    def close(self):
        pass


class Hub:
    """A hub that has one model, or refuses it."""

    refusal: str | None = None

    def model_info(self, repository):
        if Hub.refusal:
            raise OSError(Hub.refusal)
        return type("Info", (), {"sha": "abc"})


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What was asked of the library; the model lies in its cache."""
    source = folder(tmp_path / "snapshot")
    asked = []

    def snapshot(repository, **given):
        asked.append((repository, given))
        return str(source)

    monkeypatch.setattr(Hub, "refusal", None)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    return asked


def test_without_a_network_a_models_id_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"source=HuggingFaceTB/SmolLM2-135M: .*make smollm2"):
        read_source(ID, weights="raw")


def test_a_model_that_was_fetched_before_is_read_without_a_network(monkeypatch, asked):
    monkeypatch.setattr("socket.create_connection", unreachable)
    model = read_source(ID, weights="raw")
    ((repository, given),) = asked
    assert repository == ID and given["local_files_only"] and given["revision"] is None
    assert model.choices["model"] == "SmolLM2-135M"


def test_a_cache_of_its_tokenizer_alone_is_no_model(monkeypatch, asked, tmp_path):
    monkeypatch.setattr("socket.create_connection", unreachable)
    (tmp_path / "snapshot" / "config.json").unlink()
    with pytest.raises(InputError, match="hub cannot be reached; offline, type a folder"):
        read_source(ID, weights="raw")


def test_with_a_network_the_newest_is_fetched_and_only_what_is_read(monkeypatch, asked):
    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: Connection())
    read_source(ID, weights="raw")
    ((_, given),) = asked
    assert given["revision"] == "abc" and not given["local_files_only"]
    patterns = given["allow_patterns"]
    assert "config.json" in patterns and "*.safetensors" in patterns
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)


def test_what_the_hub_refuses_is_said_and_no_older_copy_is_taken(monkeypatch, asked):
    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: Connection())
    monkeypatch.setattr(Hub, "refusal", "401 Client Error\nmore")
    with pytest.raises(InputError, match=r"hub refused it \(401 Client Error\)"):
        read_source(ID, weights="raw")
    assert asked == []
