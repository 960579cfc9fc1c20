"""Fields of nested dataclasses, by their dotted names."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def value_at(parts: Mapping[str, Any], dotted: str) -> Any:
    """The value of a field; AttributeError or KeyError where there is none."""
    section, *path = dotted.split(".")
    value = parts[section]
    for name in path:
        value = getattr(value, name)
    return value


def replaced(part: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of a nested dataclass with one field changed, and checked again."""
    name, *rest = path
    inner = replaced(getattr(part, name), rest, value) if rest else value
    return dataclasses.replace(part, **{name: inner})
