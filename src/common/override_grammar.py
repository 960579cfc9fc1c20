"""Overrides `field=value` as the user typed them: Hydra's grammar, and quoting."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import OverrideParseException

from src.common.errors import InputError

GROUPS = (
    "attention",
    "ffn",
    "stability",
    "model",
    "data",
    "tokenizer",
    "preset",
    "trainer",
    "tracking",
)
"""Fields whose value is the name of a file in conf/<field>/."""

PATHS = (
    "incident",
    "checkpoint",
    "batch",
    "job",
    "run",
    "source",
    "calibration",
    "prompts_file",
    "data.path",
    "data.val_path",
    "tokenizer.path",
    "csv",
    "folder",
    "witness",
    "paths.runs",
    "paths.cache",
    "paths.book",
    "resume",
    "init",
    "fork",
    "out",
    "tracking.uri",
)
"""Fields that hold a path or address: a leading ~ is expanded, and an empty value is an error."""

FREE_TEXT = (*PATHS, "data.url", "tracking.sweep_id", "tracking.parent_run_id")
"""Fields that take any text; they are quoted here so that users need not know Hydra's escapes."""

SWEPT_TEXT = ("init",)
"""Free-text fields of which a sweep takes several values, separated by commas."""

OPEN = {"model=external": "model.kwargs"}
"""Fields that accept any key below them, by the group choice that has them."""

MAPPINGS = ("kwargs", "model.kwargs")
"""Fields whose value is a mapping in braces."""

_ENTRY = re.compile(r"[A-Za-z_]\w*:")

TARGET = "model.target"
"""The field that names code to import and call."""

_HOME = re.compile(r"(^(?:sqlite:///)?|[\[,'\"(]\s*)(~[^/,\]'\")]*)")
"""A ~ at the beginning of a path, in a single value or in a list."""

_HYDRA_SYNTAX = ("[", "'", '"', "${", "choice(")
"""A value that begins with one of these is already written in Hydra's grammar."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One `key=value` of the command line."""

    key: str
    """Dotted field or group, without the grammar's + and ~."""
    text: str
    """The value as it was typed."""


def quote_free_text(argument: str) -> str:
    """Quotes the value of a free-text field for Hydra's parser, and expands ~.

    Raises:
        InputError: a field that holds a path is empty.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT:
        return argument
    if key.lstrip("+") in PATHS:
        if not value.strip(" '\""):
            raise InputError(f"{argument}: is empty; type a path, or leave {key} out")
        value = _expand_home(key, value)
    elif not value:
        return argument
    if key in SWEPT_TEXT and "," in value and not value.startswith(_HYDRA_SYNTAX):
        return f"{key}={','.join(_quoted(part.strip()) for part in value.split(','))}"
    return f"{key}={_quoted(value)}"


def _expand_home(key: str, value: str) -> str:
    """Replaces each leading ~ or ~name by that user's home folder."""

    def home(found: re.Match[str]) -> str:
        place = os.path.expanduser(found[2])
        if place == found[2]:
            raise InputError(
                f"{key}={value}: no user has this home; type ./{place} for a folder of that name"
            )
        return found[1] + place

    if value.startswith(_HYDRA_SYNTAX) or key in SWEPT_TEXT:
        return _HOME.sub(home, value)
    return _HOME.sub(home, value, count=1) if _HOME.match(value) else value


def join_braces(arguments: Sequence[str]) -> list[str]:
    """Puts together what a shell took apart: bash makes two arguments of kwargs={a:1,b:2}.

    They arrive as kwargs=a:1 kwargs=b:2, which is not valid otherwise.
    """
    joined: list[str] = []
    parts: dict[str, list[str]] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in MAPPINGS or not _ENTRY.match(value):
            joined.append(argument)
            continue
        if key not in parts:
            joined.append(key)
        parts.setdefault(key, []).append(value)
    return [f"{a}={{{','.join(parts[a])}}}" if a in parts else a for a in joined]


def allow_new_names(arguments: Sequence[str]) -> list[str]:
    """Puts Hydra's ++ before arguments below an open field, so that new keys are accepted."""
    fields = [field for choice, field in OPEN.items() if choice in arguments]

    def is_open(argument: str) -> bool:
        key = argument.partition("=")[0]
        return any(key == field or key.startswith(f"{field}.") for field in fields)

    return [f"++{argument}" if is_open(argument) else argument for argument in arguments]


def _quoted(value: str) -> str:
    if value.startswith(_HYDRA_SYNTAX) or value == "null":
        return value
    stem = value.rstrip("\\")
    trailing = len(value) - len(stem)
    # Hydra's grammar unescapes a backslash only before a quote.
    escaped = stem.replace("\\'", "\\\\'").replace("'", "\\'") + "\\" * (2 * trailing)
    return f"'{escaped}'"


def parse(arguments: Sequence[str]) -> list[Override]:
    """The overrides in the order typed; raises Hydra's OverrideParseException."""
    parsed = parse_all(arguments)
    return [Override(key=o.key_or_group, text=_text(o)) for o in parsed]


def parse_all(arguments: Sequence[str]) -> list[HydraOverride]:
    """The same as Hydra's own objects, which say more: + and ~, sweeps. Nobody changes them."""
    return [_parsed(argument) for argument in arguments]


@functools.lru_cache(maxsize=4096)
def _parsed(argument: str) -> HydraOverride:
    """Each argument is parsed once, because several readers look and the parser is slow."""
    return OverridesParser.create().parse_overrides([argument])[0]


def file_arguments(
    arguments: Any, *, where: str, is_dropped: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """The arguments that a file holds, less the dropped ones, if they are safe to use.

    A file may come from anybody, so its arguments may only set fields to values. Code is imported
    and called only if the user types its name. A file may not change Hydra's own settings, which
    name further configuration folders and launchers' shell commands, and may not read the
    environment. `model.kwargs` are values, and may come from a file.

    Args:
        arguments: what the file holds.
        where: the file; error lines begin with it.
        is_dropped: whether to drop the argument with this key.

    Raises:
        InputError: the file does not hold a list of arguments, or one does more than set a field.
    """
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
        raise InputError(f"{where} is damaged: arguments must be a list of field=value")
    taken = [a for a in arguments if not is_dropped(a.partition("=")[0])]
    try:
        parsed = parse_all(taken)
    except OverrideParseException as error:
        raise InputError(f"{where} is damaged: {error.override} cannot be read") from error
    for argument, override in zip(taken, parsed, strict=True):
        key = override.key_or_group
        changes = override.is_add() or override.is_force_add() or override.is_delete()
        if changes or key.startswith("hydra"):
            raise InputError(f"{where} holds {argument}; a file may only set field=value")
        if key == TARGET:
            raise InputError(
                f"{where} holds {argument}; code that a file names is never run;"
                f" if you trust it, type {argument}"
            )
        if "${" in argument:
            raise InputError(
                f"{where} holds {argument}; values in a file may not refer to others;"
                f" type {key}=<value>"
            )
    return taken


def _text(override: HydraOverride) -> str:
    return value_text(override.value())


def value_text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_yaml_scalar, value))}]"
    return _yaml_scalar(value)


def _yaml_scalar(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
