"""The flags of all commands, which stand before or between the arguments `field=value`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command line asks for, apart from its fields."""

    help: bool = False
    multirun: bool = False
    """Whether fields may have several values, each of which is run."""
    info: bool = False
    """Whether to show folders, options and versions, and stop."""
    cfg: str | None = None
    """What to show of the configuration, before stopping: job."""
    config_dir: str | None = None
    """A folder with options and experiments of the user's own."""
    completion: str | None = None
    """What to do about completion in a shell: install=bash, uninstall=bash or query=bash."""
    arguments: tuple[str, ...] = ()
    """Everything else, unknown flags among it."""


SWITCHES = {
    "--help": "help",
    "-h": "help",
    "--multirun": "multirun",
    "-m": "multirun",
    "--info": "info",
    "-i": "info",
}
"""Flags without a value, and the field of `Flags` that each sets."""

VALUED = {
    "--cfg": "cfg",
    "-c": "cfg",
    "--config-dir": "config_dir",
    "-cd": "config_dir",
    "--shell-completion": "completion",
    "-sc": "completion",
}
"""Flags with a value, typed as --flag VALUE or --flag=VALUE."""

EXAMPLES = {
    "cfg": "--cfg job",
    "config_dir": "--config-dir FOLDER",
    "completion": "--shell-completion install=bash",
}


def read_flags(words: Sequence[str]) -> Flags:
    """Takes the known flags out of a command line.

    Raises:
        InputError: a flag lacks its value.
    """
    # Help is given whatever else is typed.
    if any(SWITCHES.get(word) == "help" for word in words):
        return Flags(help=True)
    found: dict[str, Any] = {}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if word in SWITCHES:
            found[SWITCHES[word]] = True
        elif flag in VALUED:
            text = value if equals else next(remaining, "")
            if not text or text.startswith("-"):
                raise InputError(f"{flag}: has no value; type {EXAMPLES[VALUED[flag]]}")
            found[VALUED[flag]] = text
        else:
            others.append(word)
    return Flags(**found, arguments=tuple(others))
