"""Fields of commands that have their own: plain values, checked one by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.errors import InputError


def number(
    given: Mapping[str, Any],
    field: str,
    kind: type,
    *,
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """The value of a field as an int or a float.

    Raises:
        InputError: it is no such number, too small or too large.
    """
    value = given[field]
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits:
        kinds = "an integer" if kind is int else "a number"
        raise InputError(f"{field}={shown(value)}: must be {kinds}")
    if least is not None and value < least:
        raise InputError(f"{field}={value}: must be at least {least}")
    if most is not None and value > most:
        raise InputError(f"{field}={value}: must be at most {most:,}")
    return kind(value)


def choice(given: Mapping[str, Any], field: str, allowed: Sequence[str | None]) -> Any:
    """The value of a field that has so many.

    Raises:
        InputError: it is another.
    """
    if given[field] not in allowed:
        listed = ", ".join(map(shown, allowed))
        raise InputError(f"{field}={shown(given[field])}: must be one of {listed}")
    return given[field]


def given_path(given: Mapping[str, Any], field: str) -> Path:
    """The value of a field that names a file or a folder.

    Args:
        given: the fields of a command.
        field: its dotted name.

    Raises:
        InputError: it names none.
    """
    section, _, name = field.rpartition(".")
    fields = given[section] if section else given
    if not isinstance(fields, Mapping):
        raise InputError(f"{section}={shown(fields)}: has the wrong type; type {field}=<folder>")
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{field}={shown(value)}: must be a file or a folder")
    return Path(value)


def shown(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value)
