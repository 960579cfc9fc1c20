"""What the user typed: Hydra's override grammar, with free text quoted for them."""

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
    "paths.runs",
    "paths.cache",
    "paths.book",
    "resume",
    "init",
    "fork",
    "out",
    "tracking.uri",
)
"""Fields that name a place: a leading ~ is the user's home, and an empty one is an error."""

FREE_TEXT = (*PATHS, "data.url", "tracking.sweep_id", "tracking.parent_run_id")
"""Fields that take any text, so that nobody has to know Hydra's escapes."""

SWEPT_TEXT = ("init",)
"""Those of them that a sweep takes several of, with commas between."""

OPEN = {"model=external": "model.kwargs"}
"""Fields below which any name may be typed, by the choice that has them."""

TARGET = "model.target"
"""The field that names code, which is imported and called."""

_HOME = re.compile(r"(^(?:sqlite:///)?|[\[,'\"(]\s*)(~[^/,\]'\")]*)")
"""A ~ where a path begins, in a value by itself or among several."""

_DECIDED = ("[", "'", '"', "${", "choice(")
"""A value that begins so is taken to be written in Hydra's grammar already."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One `key=value` of the command line."""

    key: str
    """Dotted field or group, without the grammar's + and ~."""
    text: str
    """The value as it was typed."""


def quote_free_text(argument: str) -> str:
    """Puts the value of a free-text field into quotes for Hydra's parser, and ~ in full.

    Raises:
        InputError: a field that names a place names none.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT:
        return argument
    if key.lstrip("+") in PATHS:
        if not value.strip(" '\""):
            raise InputError(f"{argument}: is empty; give a place, or leave {key} out")
        value = _with_home(key, value)
    elif not value:
        return argument
    if key in SWEPT_TEXT and "," in value and not value.startswith(_DECIDED):
        return f"{key}={','.join(_quoted(part.strip()) for part in value.split(','))}"
    return f"{key}={_quoted(value)}"


def _with_home(key: str, value: str) -> str:
    """The value with each leading ~ or ~name as the home that it stands for."""

    def home(found: re.Match[str]) -> str:
        place = os.path.expanduser(found[2])
        if place == found[2]:
            raise InputError(
                f"{key}={value}: {place} is the home of no user; ./{place} is a folder of that name"
            )
        return found[1] + place

    if value.startswith(_DECIDED) or key in SWEPT_TEXT:
        return _HOME.sub(home, value)
    return _HOME.sub(home, value, count=1) if _HOME.match(value) else value


def allow_new_names(arguments: Sequence[str]) -> list[str]:
    """The same, with those below an open field told to Hydra to be added."""
    fields = [field for choice, field in OPEN.items() if choice in arguments]

    def is_open(argument: str) -> bool:
        key = argument.partition("=")[0]
        return any(key == field or key.startswith(f"{field}.") for field in fields)

    return [f"++{argument}" if is_open(argument) else argument for argument in arguments]


def _quoted(value: str) -> str:
    if value.startswith(_DECIDED) or value == "null":
        return value
    stem = value.rstrip("\\")
    trailing = len(value) - len(stem)
    # The grammar unescapes backslashes only before a quote.
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


def out_of_file(
    arguments: Any, *, where: str, left_out: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """Arguments that a file holds, with those left out that are not wanted.

    A file may come from anybody, so its arguments set fields to values and do no more: code is
    imported and called only where the user types its name, Hydra's own settings (which name folders
    of further configuration, and shell commands of launchers) stay as they are here, and no value
    is looked up in the environment. `model.kwargs` are values, and may come from a file.

    Args:
        arguments: what the file holds.
        where: the file, which begins the line of an error.
        left_out: whether an argument of this key is not wanted.

    Raises:
        InputError: an argument does more than set a field, or is not one.
    """
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
        raise InputError(f"{where} is damaged: arguments must be a list of field=value")
    taken = [a for a in arguments if not left_out(a.partition("=")[0])]
    try:
        parsed = parse_all(taken)
    except OverrideParseException as error:
        raise InputError(f"{where} is damaged: {error.override} cannot be read") from error
    for argument, override in zip(taken, parsed, strict=True):
        key = override.key_or_group
        changes = override.is_add() or override.is_force_add() or override.is_delete()
        if changes or key.startswith("hydra"):
            raise InputError(f"{where} holds {argument}, and a file may only set field=value")
        if key == TARGET:
            raise InputError(
                f"{where} names {argument}, and code that a file names is never run;"
                f" if you trust it, type {argument}"
            )
        if "${" in argument:
            raise InputError(
                f"{where} holds {argument}, and a file's values are not looked up elsewhere;"
                f" type {key}=<value>"
            )
    return taken


def _text(override: HydraOverride) -> str:
    value = override.value()
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return _plain(value)


def _plain(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
