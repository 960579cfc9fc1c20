"""Text to which a conversion is fitted, and other text on which it is measured.

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
"""The text of data=shakespeare as it is trained on by default, its validation part included."""
NUM_HELD_OUT = 2048
WINDOW = 512
CHARS_PER_TOKEN = 8
"""More than any tokenizer makes of prose; a window that is shorter yet is left out."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids."""

    fit_BT: Tensor
    held_out_BT: Tensor


def read_text(calibration: str, embedded: TextConfig) -> str:
    """The text that is named.

    Args:
        calibration: shakespeare, or a UTF-8 file.
        embedded: data=shakespeare.

    Raises:
        InputError: it cannot be read.
    """
    if calibration == EMBEDDED:
        return embedded.text(embedded.raw(Path()))[: embedded.max_chars]
    try:
        return Path(calibration).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"calibration={calibration}: cannot be read (allowed: {EMBEDDED}, a UTF-8 file, null)"
        ) from error


def cut(
    text: str,
    tokenizer: Tokenizer,
    *,
    field: str,
    val_frac: float,
    num_tokens: int,
    context: int,
) -> Texts:
    """Windows at equal distances from the two parts of a text.

    Args:
        text: the whole.
        tokenizer: of the model.
        field: what the user typed for the text, named in errors.
        val_frac: share of the text, at its end, on which losses are measured.
        num_tokens: for the fit, about; fewer where the text has fewer.
        context: of the model, in tokens.

    Raises:
        InputError: it is too short, or the tokenizer lacks a character.
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
            f"{field}: {error}; calibration=FILE takes another text, calibration=null none"
        ) from error


def _windows(text: str, tokenizer: Tokenizer, *, num_tokens: int, window: int) -> Tensor:
    # More would be much the same windows again, of however many characters a token is.
    num_windows = max(1, min(num_tokens, len(text)) // window)
    starts = np.linspace(0, len(text), num_windows, endpoint=False).astype(int)
    rows = []
    for start in starts:
        ids = tokenizer.encode(text[start : start + CHARS_PER_TOKEN * window])[:window]
        if len(ids) == window:
            rows.append(torch.from_numpy(ids.astype(np.int64)))
    if not rows:
        raise InputError(f"has no window of {window} tokens in each of its two parts")
    return torch.stack(rows)
