"""The precision of a step that is run again, as Lightning sets it on the CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision

from nonfinite.rerun import AUTOCAST, autocast_for

WHOLE: dict[str, Callable[[], Precision]] = {
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
}
"""Precisions in which weights and batch have another type than float32."""

PRECISIONS = (*AUTOCAST, *WHOLE)
"""In which a step can be run again, by Lightning's names."""


def plugin_for(precision: str) -> Precision:
    """What converts a module and a batch to the type of their numbers."""
    return WHOLE.get(precision, Precision)()


def context_for(precision: str) -> AbstractContextManager[Any]:
    """The context of a training step."""
    if precision in AUTOCAST:
        return autocast_for(precision)
    return plugin_for(precision).forward_context()
