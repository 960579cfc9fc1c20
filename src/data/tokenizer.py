"""Tokenizers.

To add one: a class and a config here, its YAML in conf/tokenizer, and a line in TOKENIZERS.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from src.common.errors import InputError, reading
from src.common.read_checkpoint import checkpoint_of, load_model
from src.data.hub import fetch_file

MAX_IDS = 10**7
"""Larger than any real vocabulary."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    end_ids: frozenset[int]
    """Ids of tokens that end a text."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0 .. vocab_size - 1."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (number of tokens,).

        Raises:
            InputError: the text contains a character that the vocabulary lacks.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,)."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore_tokenizer` rebuilds the tokenizer."""
        ...


class CharTokenizer:
    """One token for each character of the corpus."""

    end_ids: frozenset[int] = frozenset()

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._codes = np.array([ord(char) for char in characters], dtype=np.uint32)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = codes[self._codes[ids] != codes]
        if unknown.size:
            raise InputError(
                f"character {chr(unknown[0])!r}: not among the {self.vocab_size} characters"
                " of the training corpus; tokenizer=byte accepts any text"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(char.encode()) for char in self.characters])

    def state(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token for each byte of UTF-8."""

    vocab_size = 256
    end_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; invalid UTF-8 becomes the replacement character."""
        return bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.ones(256, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        return {"kind": "byte"}


class SubwordTokenizer:
    """A byte-level tokenizer of the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, *, end_ids: Iterable[int] = ()) -> None:
        self._backend = backend
        self.end_ids = frozenset(end_ids)
        # A tokenizer file may set truncation or padding for batches; neither suits a corpus.
        backend.no_truncation()
        backend.no_padding()

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        # In a byte-level vocabulary each character of a token represents one byte.
        tokens = (self._backend.id_to_token(i) for i in range(self.vocab_size))
        return np.array([len(token or "") for token in tokens])

    def state(self) -> dict[str, Any]:
        state = {"kind": "subword", "json": self._backend.to_str()}
        return {**state, "end_ids": sorted(self.end_ids)} if self.end_ids else state


class IdTokenizer:
    """A placeholder for a corpus of token ids whose text is unknown."""

    end_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Raises InputError, because there is no vocabulary."""
        raise InputError("tokenizer=ids: has no vocabulary, so it cannot encode text")

    def decode(self, ids: list[int]) -> str:
        """The ids themselves, separated by spaces."""
        return " ".join(map(str, ids))

    def token_bytes(self) -> np.ndarray:
        """Zeros, which mean unknown: bits per byte are then not reported."""
        return np.zeros(self.vocab_size, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        return {"kind": "ids", "vocab_size": self.vocab_size}


def byte_level_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    sample: str,
    field: str,
    end_ids: Iterable[int] = (),
) -> SubwordTokenizer:
    """A tokenizer trained elsewhere, after a check that it is byte-level.

    Args:
        backend: the tokenizer as read from a file.
        sample: a text that must survive encoding and decoding unchanged.
        field: field and value that the user typed, named in errors.
        end_ids: ids of tokens that end a text.

    Raises:
        InputError: it is not byte-level, so the number of bytes of a token is unknown.
    """
    made = SubwordTokenizer(backend, end_ids=end_ids)
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    decoders = [entry["type"] for entry in decoder.get("decoders", [decoder]) if "type" in entry]
    if "ByteLevel" not in decoders or made.decode(made.encode(sample).tolist()) != sample:
        raise InputError(
            f"{field}: does not decode text to what was encoded; use a byte-level tokenizer"
        )
    return made


def restore_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """Rebuilds a tokenizer from its `state()`."""
    makers: dict[str, Callable[[], Tokenizer]] = {
        "char": lambda: CharTokenizer(state["characters"]),
        "byte": ByteTokenizer,
        "subword": lambda: SubwordTokenizer(
            tokenizers.Tokenizer.from_str(state["json"]), end_ids=state.get("end_ids", ())
        ),
        "ids": lambda: IdTokenizer(state["vocab_size"]),
    }
    return makers[state["kind"]]()


@dataclass(kw_only=True)
class TokenizerConfig(ABC):
    """What every tokenizer option declares."""

    def key(self) -> str:
        """A string that differs between configs that would tokenise a text differently."""
        return repr(self)

    @abstractmethod
    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """Builds the tokenizer, from the corpus if it needs one."""


@dataclass(kw_only=True)
class CharConfig(TokenizerConfig):
    """All characters of the corpus, including validation, so that both parts can be encoded."""

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        if not whole_text:
            raise InputError("tokenizer=char: is built from text, and data=tokens has none")
        return CharTokenizer("".join(sorted(set(whole_text))))


@dataclass(kw_only=True)
class ByteConfig(TokenizerConfig):
    """One token for each of the 256 bytes."""

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        return ByteTokenizer()


@dataclass(kw_only=True)
class BPEConfig(TokenizerConfig):
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909), trained on the training part."""

    vocab_size: int
    """Number of tokens, including the 256 bytes."""

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 2**20:
            raise ValueError(f"vocab_size={self.vocab_size}: must be from 257 to {2**20}")

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        if not train_text:
            raise InputError("tokenizer=bpe: is built from text, and data=tokens has none")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator([train_text], trainer)
        return SubwordTokenizer(backend)


@dataclass(kw_only=True)
class SmolLM2Config(TokenizerConfig):
    """A tokenizer trained elsewhere; SmolLM2's by default."""

    path: str
    """A folder with tokenizer.json, or a model id on the Hugging Face hub."""

    def key(self) -> str:
        """The content's hash for a folder; the model id for the hub."""
        file = Path(self.path) / "tokenizer.json"
        if not file.is_file():
            return super().key()
        with reading(f"tokenizer.path={self.path}"):
            return hashlib.sha256(file.read_bytes()).hexdigest()

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig.

        Raises:
            InputError: neither a local folder nor the hub has the tokenizer.
        """
        field = f"tokenizer.path={self.path}"
        file = Path(self.path) / "tokenizer.json"
        if not Path(self.path).exists():
            advice = "give a folder with tokenizer.json, or use tokenizer=char, byte or bpe"
            file = fetch_file(self.path, file.name, field=field, otherwise=advice)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"{field}: no readable tokenizer.json ({error})") from error
        return byte_level_tokenizer(backend, sample=train_text[:2000], field=field)


@dataclass(kw_only=True)
class CheckpointConfig(TokenizerConfig):
    """The tokenizer that a saved model was trained with."""

    path: str
    """A run folder, a converted model's folder, or a checkpoint."""

    def _state(self) -> dict[str, Any]:
        field = "tokenizer.path"
        state: dict[str, Any] = load_model(checkpoint_of(Path(self.path), field=field), field=field)
        return state["tokenizer"]

    def key(self) -> str:
        """The hash of the tokenizer's state, independent of its path."""
        return hashlib.sha256(json.dumps(self._state(), sort_keys=True).encode()).hexdigest()

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        return restore_tokenizer(self._state())


@dataclass(kw_only=True)
class IdsConfig(TokenizerConfig):
    """No text at all, for data=tokens; only the number of tokens is known."""

    vocab_size: int
    """Number of tokens in the vocabulary of the ids."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 2")
        if self.vocab_size > MAX_IDS:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at most {MAX_IDS:,}")

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        return IdTokenizer(self.vocab_size)


TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    "char": CharConfig,
    "byte": ByteConfig,
    "bpe": BPEConfig,
    "smollm2": SmolLM2Config,
    "ids": IdsConfig,
    "checkpoint": CheckpointConfig,
}
