"""Fields of nested dataclasses and mappings, by dotted name."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def value_at(parts: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted field name in nested dataclasses.

    Raises:
        AttributeError, KeyError: there is no such field.
    """
    section, *path = dotted.split(".")
    return functools.reduce(getattr, path, parts[section])


def replaced(part: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of a nested dataclass with one field changed; `__post_init__` checks it again."""
    name, *rest = path
    inner = replaced(getattr(part, name), rest, value) if rest else value
    return dataclasses.replace(part, **{name: inner})


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested mappings that are no mappings themselves, by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
