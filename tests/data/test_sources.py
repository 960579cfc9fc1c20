import hashlib
import http.server
import threading

import numpy as np
import pytest

from src.common.errors import InputError
from src.data.sources import (
    SOURCES,
    DownloadConfig,
    FilesConfig,
    ShakespeareConfig,
    TokensConfig,
    TorchDocsConfig,
)
from src.data.tokenizer import BPEConfig, ByteConfig, CharConfig, IdsConfig


def load(source, tmp_path, tokenizer=None, seq_len=16):
    return source.load(tokenizer or CharConfig(), cache=tmp_path / "cache", seq_len=seq_len)


def text_of(corpus, part):
    return corpus.tokenizer.decode(getattr(corpus, part).tolist())


def test_every_source_is_tested_here():
    tested = {ShakespeareConfig, TorchDocsConfig, FilesConfig, TokensConfig, DownloadConfig}
    assert set(SOURCES.values()) == tested


def test_validation_is_the_tail_and_training_never_sees_it(tmp_path):
    corpus = load(ShakespeareConfig(max_chars=5000, val_frac=0.2), tmp_path)
    whole = text_of(corpus, "train") + text_of(corpus, "val")
    assert whole.startswith("First Citizen:\n")
    assert (len(corpus.train), len(corpus.val)) == (4000, 1000)


def test_the_reference_of_torch_is_another_text(tmp_path):
    corpus = load(TorchDocsConfig(max_chars=None, val_frac=0.1), tmp_path)
    whole = text_of(corpus, "train") + text_of(corpus, "val")
    assert len(whole) > 400_000
    assert "Args:" in text_of(corpus, "val")


def test_a_torch_without_its_reference_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"data=torch_docs: _tensor_docs\.py: cannot be read"):
        load(TorchDocsConfig(max_chars=None, val_frac=0.1), tmp_path)


def test_tokens_are_cached_memory_mapped_and_keyed_by_content_and_tokenizer(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcd" * 50)
    source = FilesConfig(path=str(file), max_chars=None, val_frac=0.2)
    one = load(source, tmp_path)
    assert isinstance(one.train, np.memmap)
    folders = tmp_path / "cache" / "tokens"
    (folder,) = folders.iterdir()
    written = (folder / "train.npy").stat().st_mtime_ns
    load(source, tmp_path)
    assert (folder / "train.npy").stat().st_mtime_ns == written
    load(source, tmp_path, ByteConfig())
    assert len(list(folders.iterdir())) == 2
    file.rename(tmp_path / "b.txt")
    moved = FilesConfig(path=str(tmp_path / "b.txt"), max_chars=None, val_frac=0.2)
    load(moved, tmp_path)
    assert len(list(folders.iterdir())) == 2
    (tmp_path / "b.txt").write_text("abce" * 50)
    load(moved, tmp_path)
    assert len(list(folders.iterdir())) == 3


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("ab" * 400 + "xy" * 100)
    source = FilesConfig(path=str(file), max_chars=None, val_frac=0.2)
    corpus = load(source, tmp_path, BPEConfig(vocab_size=260), seq_len=4)
    assert len(corpus.val) == 200  # no merge of x and y was learnt
    assert len(corpus.train) < 400


def test_several_files_and_globs_are_joined_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 40)
    glob = FilesConfig(path=str(tmp_path / "[ab].txt"), max_chars=None, val_frac=0.1)
    corpus = load(glob, tmp_path, seq_len=4)
    assert (text_of(corpus, "train") + text_of(corpus, "val")) == "a" * 40 + "\n" + "b" * 40
    files = [str(tmp_path / "c.txt"), str(tmp_path / "a.txt")]
    listed = FilesConfig(path=files, max_chars=None, val_frac=0.1)
    assert text_of(load(listed, tmp_path, seq_len=4), "train").startswith("c" * 40 + "\na")


def test_token_files_with_a_tail_or_a_file_for_validation(tmp_path):
    np.arange(200, dtype=np.uint32).tofile(tmp_path / "a.bin")
    np.arange(100, 200, dtype=np.uint32).tofile(tmp_path / "v.bin")
    values = {"path": str(tmp_path / "a.bin"), "dtype": "uint32", "val_frac": 0.25}
    corpus = load(TokensConfig(val_path=None, **values), tmp_path, IdsConfig(vocab_size=200))
    assert (corpus.train.tolist(), corpus.val[0]) == (list(range(150)), 150)
    split = TokensConfig(val_path=str(tmp_path / "v.bin"), **values)
    corpus = load(split, tmp_path, IdsConfig(vocab_size=200))
    assert (len(corpus.train), corpus.val.tolist()) == (200, list(range(100, 200)))


def test_token_files_are_known_by_all_their_content_and_by_their_split(tmp_path):
    ids = np.zeros(400_000, dtype=np.uint16)
    names = ("a", "b", "c")
    for name in names:
        ids.tofile(tmp_path / f"{name}.bin")
    a, b, c = (str(tmp_path / f"{name}.bin") for name in names)

    def fingerprint(path, val_path):
        config = TokensConfig(path=path, val_path=val_path, dtype="uint16", val_frac=0.1)
        return config.fingerprint(tmp_path / "cache")

    assert fingerprint(a, None) == fingerprint(b, None)
    assert fingerprint([a, b], c) != fingerprint(a, [b, c])
    ids[123_456] = 1
    ids.tofile(tmp_path / "b.bin")
    assert fingerprint(a, None) != fingerprint(b, None)


def test_several_token_files_are_joined_on_disk(tmp_path):
    for name, first in (("a", 0), ("b", 100)):
        np.arange(first, first + 100, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    config = TokensConfig(
        path=str(tmp_path / "*.bin"), val_path=None, dtype="uint16", val_frac=0.25
    )
    corpus = load(config, tmp_path, IdsConfig(vocab_size=200))
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.tolist() + corpus.val.tolist() == list(range(200))
    bad = TokensConfig(
        path=str(tmp_path / "a.bin"), val_path=str(tmp_path / "b.bin"), dtype="uint16", val_frac=0.1
    )
    with pytest.raises(InputError, match=r"data.val_path=.*b.bin: token id 199"):
        load(bad, tmp_path, IdsConfig(vocab_size=150))


@pytest.fixture
def server():
    content = b"verily, " * 100

    class Handler(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/x.txt", content, Handler
        running.shutdown()


def test_a_download_is_verified_and_happens_once(server, tmp_path):
    url, content, handler = server
    digest = hashlib.sha256(content).hexdigest()
    source = DownloadConfig(url=url, sha256=digest, max_chars=None, val_frac=0.1)
    for _ in range(2):
        corpus = load(source, tmp_path)
    assert text_of(corpus, "train") + text_of(corpus, "val") == content.decode()
    assert handler.requests == 1
    (kept,) = (tmp_path / "cache" / "downloads").iterdir()
    kept.write_bytes(b"something else")
    load(source, tmp_path)
    assert handler.requests == 2


def test_a_download_of_other_content_is_refused_and_not_kept(server, tmp_path):
    source = DownloadConfig(url=server[0], sha256="0" * 64, max_chars=None, val_frac=0.1)
    with pytest.raises(InputError, match="must be 000"):
        load(source, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_without_network_the_error_names_the_offline_choices(tmp_path):
    source = DownloadConfig(
        url="http://127.0.0.1:9/x", sha256="0" * 64, max_chars=None, val_frac=0.1
    )
    with pytest.raises(InputError, match="data=shakespeare or data=text"):
        load(source, tmp_path)
