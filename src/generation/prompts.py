"""Prompts for text generation."""

import sys
from pathlib import Path

from src.common.errors import InputError
from src.data.tokenizer import Tokenizer

WRITEUP = (
    "Once upon a time",
    "The king said",
    "In a land far away",
    "Who goes there?",
    "The throne room was",
)
"""The five prompts with which the write-up tests its model."""


def prompts_from(prompt: str | None, prompts_file: str | None) -> list[tuple[str, str]]:
    """Prompts, each with the field that errors name.

    Raises:
        InputError: both are given, the file cannot be read, or a prompt is empty.
    """
    if prompt is not None and prompts_file is not None:
        raise InputError(f"prompts_file={prompts_file}: type prompts_file or prompt, not both")
    if prompt is not None:
        if not prompt:
            raise _empty("prompt=")
        return [(_field(prompt), prompt)]
    if prompts_file is None:
        return [(_field(text), text) for text in WRITEUP]
    found = [
        (f"prompts_file={prompts_file}, line {number}", line)
        for number, line in enumerate(_read(prompts_file).splitlines(), start=1)
    ]
    if not found:
        raise _empty(f"prompts_file={prompts_file}")
    for place, line in found:
        if not line:
            raise _empty(place)
    return found


def encode(place: str, text: str, tokenizer: Tokenizer, *, context: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        InputError: it contains a character that the vocabulary lacks, or exceeds the context.
    """
    try:
        ids = [int(token) for token in tokenizer.encode(text)]
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if len(ids) > context:
        raise InputError(f"{place}: has {len(ids):,} tokens; the model's context is {context:,}")
    return ids


def _field(text: str) -> str:
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return f"prompt={shown!r}"


def _empty(place: str) -> InputError:
    return InputError(f"{place}: is empty; must have at least one character")


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"prompts_file={name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts_file={name}: is not UTF-8 text") from error
