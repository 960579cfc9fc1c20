"""Texts for fitting a conversion, and held-out text for measuring it.

Axes: B windows, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.common.errors import InputError
from src.data.corpus import TextConfig
from src.data.tokenizer import Tokenizer

EMBEDDED = "shakespeare"
"""The text of data=shakespeare with its default settings, including the validation part."""
NUM_HELD_OUT = 2048
WINDOW = 512
CHARS_PER_TOKEN = 8
"""More characters than an average token of prose; windows that turn out short are dropped."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids of both parts."""

    fit_BT: Tensor
    held_out_BT: Tensor


def read_text(calibration: str, embedded: TextConfig) -> str:
    """The calibration text.

    Args:
        calibration: shakespeare, or a UTF-8 file.
        embedded: configuration of data=shakespeare.

    Raises:
        InputError: the file cannot be read.
    """
    if calibration == EMBEDDED:
        return embedded.text(embedded.raw(Path()))[: embedded.max_chars]
    try:
        return Path(calibration).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"calibration={calibration}: cannot be read (allowed: {EMBEDDED}, a UTF-8 file, null)"
        ) from error


def cut_windows(
    text: str,
    tokenizer: Tokenizer,
    *,
    field: str,
    val_frac: float,
    num_tokens: int,
    context: int,
) -> Texts:
    """Evenly spaced windows of the two parts of a text.

    Args:
        text: the whole text.
        tokenizer: the model's tokenizer.
        field: field and value that the user typed, named in errors.
        val_frac: share of the text, at its end, on which losses are measured.
        num_tokens: approximate number of tokens for the fit; fewer if the text is shorter.
        context: the model's context, in tokens.

    Raises:
        InputError: the text is too short, or the tokenizer lacks a character.
    """
    split = round(len(text) * (1 - val_frac))
    window = min(WINDOW, context)
    try:
        return Texts(
            fit_BT=_windows(text[:split], tokenizer, num_tokens=num_tokens, window=window),
            held_out_BT=_windows(text[split:], tokenizer, num_tokens=NUM_HELD_OUT, window=window),
        )
    except InputError as error:
        raise InputError(
            f"{field}: {error}; type calibration=FILE for another text, or calibration=null"
        ) from error


def _windows(text: str, tokenizer: Tokenizer, *, num_tokens: int, window: int) -> Tensor:
    # More windows than characters / window would overlap almost completely.
    num_windows = max(1, min(num_tokens, len(text)) // window)
    starts = np.linspace(0, len(text), num_windows, endpoint=False).astype(int)
    rows = []
    for start in starts:
        ids = tokenizer.encode(text[start : start + CHARS_PER_TOKEN * window])[:window]
        if len(ids) == window:
            rows.append(torch.from_numpy(ids.astype(np.int64)))
    if not rows:
        raise InputError(f"one of its two parts is shorter than a window of {window} tokens")
    return torch.stack(rows)
