"""Converts this project's tokenizers to the `tokenizers` library, for exported models."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from src.data.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that a byte-level vocabulary represents by the same character; others start at 256."""


def as_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """A library tokenizer with the same tokens and ids; None if the tokens' text is unknown."""
    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizers.Tokenizer.from_str(tokenizer.state()["json"])
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes()
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer.characters)
    return None


def characters_of(backend: tokenizers.Tokenizer) -> CharTokenizer | None:
    """The character tokenizer that `as_library` wrote; None for any other tokenizer."""
    content = json.loads(backend.to_str())
    vocabulary = content["model"].get("vocab")
    if content["model"].get("type") != "WordLevel" or not isinstance(vocabulary, dict):
        return None
    found = CharTokenizer("".join(sorted(vocabulary)))
    written = json.loads(_characters(found.characters).to_str())
    return found if written == content else None


def _bytes() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    symbols = {byte: chr(byte) for byte in PRINTABLE}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {symbol: byte for byte, symbol in symbols.items()}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _characters(characters: str) -> tokenizers.Tokenizer:
    """One token for each character; an unknown character has no token."""
    vocabulary = {character: number for number, character in enumerate(characters)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return made
