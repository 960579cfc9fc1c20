"""Tokenizers.

A new one: a class and a config here, its YAML in conf/tokenizer, a line in TOKENIZERS.
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
"""Beyond any vocabulary."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    end_ids: frozenset[int]
    """Tokens that end a text."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0 .. vocab_size - 1."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (number of tokens,).

        Raises:
            InputError: the text holds something the vocabulary lacks.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,)."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore_tokenizer` makes it again."""
        ...


class CharTokenizer:
    """One token for each character of the corpus."""

    end_ids: frozenset[int] = frozenset()

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._codes = np.array([ord(char) for char in characters], dtype=np.uint32)

    @property
    def vocab_size(self) -> int:
        """See Tokenizer."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = codes[self._codes[ids] != codes]
        if unknown.size:
            raise InputError(
                f"character {chr(unknown[0])!r}: not among the {self.vocab_size} characters"
                " of the training corpus; tokenizer=byte takes any text"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return "".join(self.characters[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        return np.array([len(char.encode()) for char in self.characters])

    def state(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token for each byte of UTF-8."""

    vocab_size = 256
    end_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer; what is no UTF-8 becomes the replacement character."""
        return bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        return np.ones(256, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": "byte"}


class SubwordTokenizer:
    """A byte-level tokenizer of the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, *, end_ids: Iterable[int] = ()) -> None:
        self._backend = backend
        self.end_ids = frozenset(end_ids)
        # Settings for batches of a model, which would cut or fill up a corpus.
        backend.no_truncation()
        backend.no_padding()

    @property
    def vocab_size(self) -> int:
        """See Tokenizer."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        # In a byte-level vocabulary every character of a token stands for one byte.
        tokens = (self._backend.id_to_token(i) for i in range(self.vocab_size))
        return np.array([len(token or "") for token in tokens])

    def state(self) -> dict[str, Any]:
        """See Tokenizer."""
        state = {"kind": "subword", "json": self._backend.to_str()}
        return {**state, "end_ids": sorted(self.end_ids)} if self.end_ids else state


class IdTokenizer:
    """Stands in where a corpus comes as token ids and nobody knows their text."""

    end_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Cannot be done: raises InputError."""
        raise InputError("tokenizer=ids: holds no vocabulary, so it cannot read text")

    def decode(self, ids: list[int]) -> str:
        """The ids themselves, with blanks between."""
        return " ".join(map(str, ids))

    def token_bytes(self) -> np.ndarray:
        """Zeros: unknown, so that no bits per byte are reported."""
        return np.zeros(self.vocab_size, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": "ids", "vocab_size": self.vocab_size}


def made_elsewhere(
    backend: tokenizers.Tokenizer,
    *,
    sample: str,
    field: str,
    end_ids: Iterable[int] = (),
) -> SubwordTokenizer:
    """A tokenizer that was not made here.

    Args:
        backend: as it was read.
        sample: a text that it must give back as it was.
        field: what the user typed for it, named in errors.
        end_ids: tokens that end a text.

    Raises:
        InputError: it is not byte-level, so that no one knows the bytes of a token.
    """
    made = SubwordTokenizer(backend, end_ids=end_ids)
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    decoders = [entry["type"] for entry in decoder.get("decoders", [decoder]) if "type" in entry]
    if "ByteLevel" not in decoders or made.decode(made.encode(sample).tolist()) != sample:
        raise InputError(
            f"{field}: does not give text back as it was; a byte-level tokenizer is needed"
        )
    return made


def restore_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `state()` this is."""
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
        """Tells apart two configs that would tokenise one text differently."""
        return repr(self)

    @abstractmethod
    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """The tokenizer, made from the corpus where it needs one."""


@dataclass(kw_only=True)
class CharConfig(TokenizerConfig):
    """Characters of the whole corpus, validation included, so that both parts can be written."""

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig."""
        if not whole_text:
            raise InputError("tokenizer=char: is made from text, and data=tokens has none")
        return CharTokenizer("".join(sorted(set(whole_text))))


@dataclass(kw_only=True)
class ByteConfig(TokenizerConfig):
    """The 256 bytes."""

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig."""
        return ByteTokenizer()


@dataclass(kw_only=True)
class BPEConfig(TokenizerConfig):
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909), trained on the training part."""

    vocab_size: int
    """Tokens to learn, the 256 bytes among them."""

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 2**20:
            raise ValueError(f"vocab_size={self.vocab_size}: must be from 257 to {2**20}")

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig."""
        if not train_text:
            raise InputError("tokenizer=bpe: is made from text, and data=tokens has none")
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
    """A tokenizer made elsewhere, SmolLM2's by default."""

    path: str
    """A folder with tokenizer.json, or a model's id on the Hugging Face hub."""

    def key(self) -> str:
        """See TokenizerConfig: a folder's by its content, the hub's by its id."""
        file = Path(self.path) / "tokenizer.json"
        if not file.is_file():
            return super().key()
        with reading(f"tokenizer.path={self.path}"):
            return hashlib.sha256(file.read_bytes()).hexdigest()

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig.

        Raises:
            InputError: neither the folder nor, by network, the hub has it.
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
        return made_elsewhere(backend, sample=train_text[:2000], field=field)


@dataclass(kw_only=True)
class CheckpointConfig(TokenizerConfig):
    """The tokenizer with which a saved model was trained."""

    path: str
    """A run folder, a converted model's folder, or a checkpoint."""

    def _state(self) -> dict[str, Any]:
        field = "tokenizer.path"
        state: dict[str, Any] = load_model(checkpoint_of(Path(self.path), field=field), field=field)
        return state["tokenizer"]

    def key(self) -> str:
        """See TokenizerConfig: by its content, wherever it lies."""
        return hashlib.sha256(json.dumps(self._state(), sort_keys=True).encode()).hexdigest()

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig."""
        return restore_tokenizer(self._state())


@dataclass(kw_only=True)
class IdsConfig(TokenizerConfig):
    """No text at all: for data=tokens with model.vocab_size given."""

    vocab_size: int
    """Number of tokens in the vocabulary that the ids come from."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 2")
        if self.vocab_size > MAX_IDS:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at most {MAX_IDS:,}")

    def build(self, train_text: str, whole_text: str) -> Tokenizer:
        """See TokenizerConfig."""
        return IdTokenizer(self.vocab_size)


TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    "char": CharConfig,
    "byte": ByteConfig,
    "bpe": BPEConfig,
    "smollm2": SmolLM2Config,
    "ids": IdsConfig,
    "checkpoint": CheckpointConfig,
}
