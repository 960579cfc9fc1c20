"""A corpus as two arrays of token ids: split, tokenised once, cached and memory-mapped."""

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.common.errors import InputError
from src.data.tokenizer import Tokenizer, TokenizerConfig, restore_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation tokens; validation is a contiguous tail that training never sees."""

    train: np.ndarray
    """(number of training tokens,), unsigned integers."""
    val: np.ndarray
    """(number of validation tokens,), unsigned integers."""
    tokenizer: Tokenizer
    fingerprint: str
    """A hash of the content and the split; see DataConfig."""

    def check(self, *, seq_len: int) -> None:
        """Raises InputError unless both parts hold at least one window of seq_len + 1 tokens."""
        for part, tokens in (("training", self.train), ("validation", self.val)):
            if len(tokens) < seq_len + 1:
                raise InputError(
                    f"recipe.seq_len={seq_len}: must be below the {len(tokens)} tokens"
                    f" of the {part} part"
                )


@dataclass(kw_only=True)
class DataConfig(ABC):
    """What every corpus option declares."""

    val_frac: float
    """Share of the corpus that is held out, from its end; between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.val_frac < 1:
            raise ValueError(f"val_frac={self.val_frac}: must be between 0 and 1")

    @abstractmethod
    def fingerprint(self, cache: Path) -> str:
        """A hash of the content and the split, independent of paths. Raises InputError."""

    @abstractmethod
    def load(self, tokenizer: TokenizerConfig, *, cache: Path, seq_len: int) -> Corpus:
        """The tokenised corpus. Raises InputError if it is unusable, before anything is written."""


@dataclass(kw_only=True)
class TextConfig(DataConfig):
    """A corpus of text."""

    max_chars: int | None
    """Use only the first max_chars characters; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"max_chars={self.max_chars}: must be at least 1")

    @abstractmethod
    def raw(self, cache: Path) -> bytes:
        """The bytes from which the text is made; their hash is the cache key. Raises InputError."""

    @abstractmethod
    def text(self, raw: bytes) -> str:
        """Decodes the text from the bytes of `raw`. Raises InputError."""

    def fingerprint(self, cache: Path) -> str:
        return self._fingerprint(self.raw(cache))

    def _fingerprint(self, raw: bytes) -> str:
        digest = hashlib.sha256(f"{self.max_chars}/{self.val_frac}/".encode())
        digest.update(raw)
        return digest.hexdigest()[:16]

    def load(self, tokenizer: TokenizerConfig, *, cache: Path, seq_len: int) -> Corpus:
        raw = self.raw(cache)
        fingerprint = self._fingerprint(raw)
        key = hashlib.sha256(f"{fingerprint}/{tokenizer.key()}".encode()).hexdigest()
        folder = cache / "tokens" / key[:16]
        corpus = _open(folder, fingerprint)
        if corpus is None:
            text = self.text(raw)[: self.max_chars]
            split = round(len(text) * (1 - self.val_frac))
            built = tokenizer.build(text[:split], text)
            dtype = np.uint16 if built.vocab_size <= 2**16 else np.uint32
            train = built.encode(text[:split]).astype(dtype)
            val = built.encode(text[split:]).astype(dtype)
            built_corpus = Corpus(train=train, val=val, tokenizer=built, fingerprint=fingerprint)
            built_corpus.check(seq_len=seq_len)
            with writing_cache(folder):
                _store(folder, train=train, val=val, tokenizer=built)
            corpus = _open(folder, fingerprint)
            if corpus is None:
                raise InputError(
                    f"paths.cache: {folder} cannot be read after it was written; delete it, or name"
                    " another folder"
                )
        corpus.check(seq_len=seq_len)
        return corpus


@contextlib.contextmanager
def writing_cache(place: Path) -> Iterator[None]:
    """Turns an OSError raised inside into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"paths.cache: {place} cannot be written ({error.strerror or error})"
        ) from error


def _store(folder: Path, *, train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer) -> None:
    """Writes a draft folder and renames it, so that the cache is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    np.save(draft / "train.npy", train)
    np.save(draft / "val.npy", val)
    state: dict[str, Any] = tokenizer.state()
    (draft / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    try:
        draft.rename(folder)
    except OSError:  # another process has stored the same content first
        shutil.rmtree(draft)


def _open(folder: Path, fingerprint: str) -> Corpus | None:
    """The cached corpus; None where there is none, or a damaged one, which is taken away."""
    if not folder.is_dir():
        return None
    try:
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return Corpus(
            train=np.load(folder / "train.npy", mmap_mode="r"),
            val=np.load(folder / "val.npy", mmap_mode="r"),
            tokenizer=restore_tokenizer(state),
            fingerprint=fingerprint,
        )
    except PermissionError as error:
        # The cache may be intact and belong to another user, so it is not deleted.
        raise InputError(
            f"paths.cache: {folder} cannot be read ({error.strerror}); name another folder"
        ) from error
    except Exception:  # the tokenizers library raises bare Exceptions
        logger.warning("the cache %s is damaged; building it again", folder)
        with writing_cache(folder):
            shutil.rmtree(folder)
        return None
