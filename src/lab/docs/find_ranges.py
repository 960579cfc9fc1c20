"""The values that a field takes, asked of its own checks.

A check names what is allowed when it rejects a value, so each field is tried with values that are
probably wrong, and the errors say the rest.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from src.common.nested_values import replaced, value_at

KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "mapping"}

PROBES: dict[Any, tuple[Any, ...]] = {
    int: (-1, 10**12),
    float: (-1.0, 0.0, 2.0, math.inf),
    str: ("?",),
    list: ([], ["?"]),
}
"""Values that the check of a field may reject, by type."""

_REJECTION = re.compile(r"[\w.]+=.*?: (?P<reason>.*)", re.DOTALL)


def kind_of(annotation: Any) -> tuple[Any, bool]:
    """The type of a field, and whether it can be null. The type of a list is list."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if is_union else (annotation,)
    (kind,) = (member for member in members if member is not type(None))
    return get_origin(kind) or kind, type(None) in members


def range_of(
    part: Any, path: str, annotation: Any, check: Callable[[Any], None] | None = None
) -> str:
    """What a field of a dataclass may hold, in words.

    Args:
        part: a valid instance.
        path: the field, dotted if it is nested.
        annotation: its type.
        check: raises ValueError if the part does not fit the rest of the configuration.
    """
    kind, can_be_null = kind_of(annotation)
    reasons: list[str] = []
    for value in _probes(kind, value_at({"part": part}, f"part.{path}")):
        try:
            changed = replaced(part, path.split("."), value)
            if check is not None:
                check(changed)
        except ValueError as error:
            found = _REJECTION.fullmatch(str(error))
            if found is None:
                raise AssertionError(f"{error}: does not begin with field=value:") from error
            reasons.append(_plain(found["reason"]))
    return in_words(kind, reasons, can_be_null=can_be_null)


def in_words(kind: Any, reasons: Sequence[str], *, can_be_null: bool = False) -> str:
    """A type and the reasons for which values were rejected, as one phrase."""
    limits = ", ".join(dict.fromkeys(reasons))
    if limits.startswith("one of "):
        words = limits.removeprefix("one of ")
    else:
        names = [KINDS[kind]] if kind in KINDS and limits != KINDS[kind] else []
        words = ", ".join([*names, *([limits] if limits else [])])
    return f"{words}, or null" if can_be_null and "null" not in words else words


def _probes(kind: Any, value: Any) -> tuple[Any, ...]:
    if kind is list and isinstance(value, list | tuple) and value and isinstance(value[0], float):
        return ([], [2.0, 2.0])
    return PROBES.get(kind, ())


def _plain(reason: str) -> str:
    """The reason without "must be", and without the values of other fields."""
    reason = re.sub(r"(\b[a-z][\w.]*)=[\w.]+", r"\1", reason.removeprefix("must be "))
    reason = re.sub(r"^must divide ", "divides ", reason)
    return re.sub(r"^(must|an integer) ", "", reason)


def fields_of(part: Any, above: str = "") -> list[tuple[str, Any]]:
    """The fields of a dataclass and of those in it, as dotted names with their annotations."""
    found: list[tuple[str, Any]] = []
    # Of a module with postponed annotations, a field's own `type` is text.
    annotations = get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            found += fields_of(value, f"{above}{field.name}.")
        else:
            found.append((f"{above}{field.name}", annotations[field.name]))
    return found
