import numpy as np
import pytest
import tokenizers
import torch

from src.common.errors import InputError
from src.data.tokenizer import (
    TOKENIZERS,
    BPEConfig,
    ByteConfig,
    CharConfig,
    CheckpointConfig,
    IdsConfig,
    SmolLM2Config,
    byte_level_tokenizer,
    restore_tokenizer,
)

TEXT = "To be, or not to be: that is the question — naïve “quotes” ☕\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tokenizer.json, as a download of SmolLM2 is one."""
    made = BPEConfig(vocab_size=300).build(TEXT, TEXT)
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(made.state()["json"])
    return path


@pytest.fixture(params=["char", "byte", "bpe", "smollm2"])
def tokenizer(request, folder):
    configs = {
        "char": CharConfig(),
        "byte": ByteConfig(),
        "bpe": BPEConfig(vocab_size=300),
        "smollm2": SmolLM2Config(path=str(folder)),
    }
    assert type(configs[request.param]) is TOKENIZERS[request.param]
    return configs[request.param].build(TEXT, TEXT)


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.ndim == 1
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids.tolist()) == TEXT


def test_token_bytes_add_up_to_the_text(tokenizer):
    assert tokenizer.token_bytes()[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())


def test_its_state_makes_it_again(tokenizer):
    again = restore_tokenizer(tokenizer.state())
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_bpe_is_shorter_than_bytes_and_has_the_size_asked_for():
    bpe = BPEConfig(vocab_size=280).build(TEXT, TEXT)
    assert bpe.vocab_size == 280
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2


def test_an_unknown_character_is_named():
    with pytest.raises(InputError, match=r"'z'.*tokenizer=byte"):
        CharConfig().build("", "abc").encode("abz")


def test_ids_have_no_text():
    ids = IdsConfig(vocab_size=7).build("", "")
    assert ids.decode([1, 2]) == "1 2"
    with pytest.raises(InputError, match="cannot encode text"):
        ids.encode("a")


def test_without_network_the_hub_is_a_clear_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(InputError, match=r"some/model.*offline, give a folder"):
        SmolLM2Config(path="some/model").build("", "")


def test_a_folder_is_known_by_its_content(folder, tmp_path):
    content = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    here, there = SmolLM2Config(path=str(folder)), SmolLM2Config(path=str(tmp_path))
    assert here.key() == there.key()
    (tmp_path / "tokenizer.json").write_text(content.replace("▁", "_") + " ")
    assert here.key() != there.key()


def test_settings_for_batches_do_not_cut_a_corpus(folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(10)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    made = SmolLM2Config(path=str(tmp_path)).build(TEXT, TEXT)
    assert made.decode(made.encode(TEXT).tolist()) == TEXT


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "?": 1}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="does not decode text"):
        SmolLM2Config(path=str(tmp_path)).build(TEXT, TEXT)


def test_a_saved_models_tokenizer_is_told_by_its_content(tmp_path):
    ours = BPEConfig(vocab_size=280).build(TEXT, TEXT)
    sections = ("model", "attention", "ffn", "recipe", "kinds", "choices")
    config = {name: {} for name in sections}
    content = {"state_dict": {}, "config": config, "tokenizer": ours.state()}
    for name in ("one.ckpt", "two.ckpt"):
        torch.save(content, tmp_path / name)
    torch.save(content | {"tokenizer": ByteConfig().build("", "").state()}, tmp_path / "three.ckpt")
    one, two, three = (
        CheckpointConfig(path=str(tmp_path / f"{name}.ckpt")) for name in ("one", "two", "three")
    )
    assert type(one) is TOKENIZERS["checkpoint"]
    assert np.array_equal(one.build("", "").encode(TEXT), ours.encode(TEXT))
    assert one.key() == two.key() != three.key()
    with pytest.raises(InputError, match=r"tokenizer\.path=nowhere: no such run folder"):
        CheckpointConfig(path="nowhere").key()


def test_tokens_that_end_a_text_are_kept(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made = byte_level_tokenizer(backend, sample=TEXT, field="x", end_ids=[2, 5])
    assert restore_tokenizer(made.state()).end_ids == {2, 5}
    assert SmolLM2Config(path=str(folder)).build(TEXT, TEXT).end_ids == frozenset()
