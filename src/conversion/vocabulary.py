"""Our tokenizers in the form of the `tokenizers` library, for models that others are to read."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from src.data.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that stand for themselves in a byte-level vocabulary; the others follow from 256 on."""


def as_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """The same tokens under the same ids; None where their text is not known."""
    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizers.Tokenizer.from_str(tokenizer.state()["json"])
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes()
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer.characters)
    return None


def characters_of(backend: tokenizers.Tokenizer) -> CharTokenizer | None:
    """The tokenizer of characters that `as_library` wrote; None where it is another's."""
    content = json.loads(backend.to_str())
    vocabulary = content["model"].get("vocab")
    if content["model"].get("type") != "WordLevel" or not isinstance(vocabulary, dict):
        return None
    found = CharTokenizer("".join(sorted(vocabulary)))
    written = json.loads(_characters(found.characters).to_str())
    return found if written == content else None


def _bytes() -> tokenizers.Tokenizer:
    """Byte-level, without merges."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    symbols = {byte: chr(byte) for byte in PRINTABLE}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {symbol: byte for byte, symbol in symbols.items()}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _characters(characters: str) -> tokenizers.Tokenizer:
    """A word a character; one that is not there has no token."""
    vocabulary = {character: number for number, character in enumerate(characters)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return made
