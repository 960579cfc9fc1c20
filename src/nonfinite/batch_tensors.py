"""Looks into a batch at any depth: containers, dataclasses, named tuples and plain objects."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.finite_checks import all_finite, can_be_nonfinite, is_mask

MAX_DEPTH = 8
MAX_ENTRIES = 100_000
"""Of a long list, only the first entries are looked at."""


def tensors_of(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch with the expressions that reach them, such as `batch['mel'][2]`.

    NumPy arrays and NaN or infinite numbers count as tensors.
    """
    yield from _walk(batch, "batch", 0, set())


def first_nonfinite(batch: Any) -> tuple[str, Tensor] | None:
    """The first tensor that is neither finite nor an additive mask; None if there is none."""
    for place, tensor in tensors_of(batch):
        if can_be_nonfinite(tensor) and not all_finite([tensor]) and not is_mask(tensor):
            return place, tensor
    return None


def _walk(value: Any, place: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
        return
    if isinstance(value, float):
        yield place, torch.tensor(value)
        return
    plain = value is None or isinstance(value, str | bytes | int | nn.Module | type)
    if plain or depth > MAX_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    if _is_array(value):
        if value.dtype.kind in "fc":
            yield place, torch.as_tensor(value)
        return
    for name, entry in _entries(value):
        yield from _walk(entry, f"{place}{name}", depth + 1, seen)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, each with what is appended to reach it."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", getattr(value, name)) for name in value._fields)
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", entry) for i, entry in enumerate(value[:MAX_ENTRIES]))
    elif dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        yield from ((f".{f.name}", getattr(value, f.name, None)) for f in fields)
    elif hasattr(value, "__dict__"):
        # Reading vars() runs none of the user's code, as properties would.
        yield from ((f".{name}", entry) for name, entry in vars(value).items())


def _is_array(value: Any) -> bool:
    """Whether a value is a NumPy array, told without importing NumPy."""
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("ndarray", "float64", "float32")
