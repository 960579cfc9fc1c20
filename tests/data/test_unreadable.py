"""Files that may not be read, or are damaged: one line, or made anew."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import InputError
from src.common.storage import file_digest
from src.data import shakespeare
from src.data.corpus import Corpus
from src.data.sources import FilesConfig, ShakespeareConfig, TokensConfig
from src.data.tokenizer import ByteConfig, CharConfig, IdsConfig, SmolLM2Config

TEXT = "to be or not to be\n" * 40


@pytest.fixture
def forbid(monkeypatch):
    """Has the file system refuse to open whatever lies below a place, as for another user."""

    def forbidden(place: Path) -> None:
        def guarded(original):
            def ask(path, *args, **kwargs):
                if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place):
                    raise PermissionError(13, "Permission denied", str(path))
                return original(path, *args, **kwargs)

            return ask

        for module, name in ((__import__("io"), "open"), (__import__("builtins"), "open")):
            monkeypatch.setattr(module, name, guarded(getattr(module, name)))

    return forbidden


@pytest.fixture
def text(tmp_path, monkeypatch) -> FilesConfig:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return FilesConfig(path="text.txt", max_chars=None, val_frac=0.1)


def load(data, tokenizer=None) -> Corpus:
    return data.load(tokenizer or CharConfig(), cache=Path("cache"), seq_len=8)


def shakespeare_config() -> ShakespeareConfig:
    return ShakespeareConfig(max_chars=1000, val_frac=0.1)


def test_plays_that_may_not_be_read_are_named(forbid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plays = shakespeare.play_files()
    forbid(plays[0].parent)
    with pytest.raises(InputError, match=r"data=shakespeare: .*cannot be read .Permission denied"):
        load(shakespeare_config())


@pytest.mark.parametrize("tokenizer", [CharConfig(), ByteConfig()], ids=["char", "byte"])
def test_plays_that_may_not_be_listed_are_told(tokenizer, tmp_path, monkeypatch):
    """A folder without the right to be read looks like one without files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(()))
    with pytest.raises(InputError, match=r"data=shakespeare: no play can be read in"):
        load(shakespeare_config(), tokenizer)
    assert os.listdir() == []


def test_a_text_that_may_not_be_read_is_named(text, forbid):
    forbid(Path("text.txt"))
    with pytest.raises(InputError, match=r"data.path=text.txt: cannot be read .Permission denied"):
        load(text)


def test_ids_that_may_not_be_read_are_named(forbid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(100, dtype=np.uint16).tofile("ids.bin")
    data = TokensConfig(path="ids.bin", val_path=None, dtype="uint16", val_frac=0.2)
    forbid(Path("ids.bin"))
    for ask in (lambda: load(data, IdsConfig(vocab_size=100)), lambda: data.fingerprint(Path("c"))):
        with pytest.raises(InputError, match=r"data.path=ids.bin: cannot be read"):
            ask()


def test_a_tokenizer_that_may_not_be_read_is_named(text, forbid):
    Path("made").mkdir()
    Path("made", "tokenizer.json").write_text("{}")
    forbid(Path("made"))
    with pytest.raises(InputError, match=r"tokenizer.path=made: cannot be read"):
        load(text, SmolLM2Config(path="made"))


def test_a_cache_that_may_not_be_read_is_left_as_it_is(text, forbid):
    load(text)
    (folder,) = Path("cache", "tokens").iterdir()
    before = sorted(os.listdir(folder))
    forbid(folder)
    with pytest.raises(InputError, match=r"paths.cache: .* cannot be read .Permission denied"):
        load(text)
    assert sorted(os.listdir(folder)) == before


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def of_another_kind(file: Path) -> None:
    file.write_text(json.dumps([1]))


def without_sense(file: Path) -> None:
    file.write_text(json.dumps({"kind": "subword", "json": "{"}))


@pytest.mark.parametrize("damage", [emptied, halved, a_folder, of_another_kind, without_sense])
@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer.json"])
def test_a_cache_that_is_damaged_is_made_anew(name, damage, text):
    corpus = load(text)
    # Copies, because a file that is cut takes its pages from whoever maps it.
    before = [np.array(corpus.train), np.array(corpus.val), corpus.tokenizer.state()]
    del corpus
    (folder,) = Path("cache", "tokens").iterdir()
    damage(folder / name)
    again = load(text)
    assert np.array_equal(again.train, before[0])
    assert np.array_equal(again.val, before[1])
    assert again.tokenizer.state() == before[2]


def test_a_file_in_the_place_of_the_cache_is_named(text):
    load(text)
    (folder,) = Path("cache", "tokens").iterdir()
    shutil.rmtree(folder)
    folder.write_text("no folder")
    with pytest.raises(InputError, match=rf"paths.cache: {folder} cannot be read"):
        load(text)


def test_ids_that_were_joined_by_half_are_joined_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        np.arange(50, dtype=np.uint16).tofile(f"{name}.bin")
    data = TokensConfig(path=["a.bin", "b.bin"], val_path=None, dtype="uint16", val_frac=0.2)
    tokenizer = IdsConfig(vocab_size=100)
    whole = np.array(load(data, tokenizer).train)
    (joined,) = Path("cache", "tokens").glob("*.bin")
    halved(joined)
    assert np.array_equal(load(data, tokenizer).train, whole)


def test_a_digest_that_was_written_by_half_is_written_anew(text):
    digest = file_digest(Path("text.txt"), Path("cache"))
    (note,) = Path("cache", "digests").iterdir()
    for damage in (halved, emptied):
        damage(note)
        assert file_digest(Path("text.txt"), Path("cache")) == digest == note.read_text()
