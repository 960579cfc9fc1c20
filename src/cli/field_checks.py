"""Checks of the fields of commands other than train and describe, which are plain values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.errors import InputError


def number(
    values: Mapping[str, Any],
    field: str,
    kind: type,
    *,
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """The value of a field as `kind`, int or float.

    Raises:
        InputError: the value is not such a number, below `least` or above `most`.
    """
    value = values[field]
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits:
        kinds = "an integer" if kind is int else "a number"
        raise InputError(f"{field}={shown(value)}: must be {kinds}")
    if least is not None and value < least:
        raise InputError(f"{field}={value}: must be at least {least}")
    if most is not None and value > most:
        raise InputError(f"{field}={value}: must be at most {most:,}")
    return kind(value)


def choice(values: Mapping[str, Any], field: str, allowed: Sequence[str | None]) -> Any:
    """The value of a field that takes one of several values.

    Raises:
        InputError: the value is not among `allowed`.
    """
    if values[field] not in allowed:
        listed = ", ".join(map(shown, allowed))
        raise InputError(f"{field}={shown(values[field])}: must be one of {listed}")
    return values[field]


def given_path(values: Mapping[str, Any], field: str) -> Path:
    """The value of a field that names a file or a folder.

    Args:
        values: the fields of a command.
        field: the dotted name of the field.

    Raises:
        InputError: the value is empty or not text.
    """
    section, _, name = field.rpartition(".")
    fields = values[section] if section else values
    if not isinstance(fields, Mapping):
        raise InputError(f"{section}={shown(fields)}: has the wrong type; type {field}=<folder>")
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{field}={shown(value)}: must be a file or a folder")
    return Path(value)


def shown(value: Any) -> str:
    """A value as a user types it."""
    return "null" if value is None else str(value)
