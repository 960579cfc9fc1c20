"""--cfg job and --info: what a command line means, and what it can be made of."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from src.common import terminal
from src.common.environment import versions
from src.common.override_grammar import GROUPS
from src.config.hydra_compose import conf_folders, option_names

if TYPE_CHECKING:
    from src.config.run_config import RunConfig


def show_run(config: "RunConfig") -> int:
    """Prints the resolved configuration of a run, as its config.yaml would hold it."""
    return show_fields(config.plain())


def show_fields(fields: Mapping[str, Any]) -> int:
    """Prints fields as YAML; returns the exit code."""
    terminal.say(yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True).rstrip())
    return 0


def show_info() -> int:
    """Prints the folders, options and versions that the commands use; returns the exit code."""
    rows = [[f"{group}=", ", ".join(option_names(group))] for group in GROUPS]
    rows += [["--multirun experiment=", ", ".join(option_names("experiment"))]]
    rows += [["--multirun hydra/launcher=", ", ".join(option_names("hydra/launcher"))]]
    for name, allowed in rows:
        terminal.say(f"{name}{allowed}")
    terminal.say(f"options: {', '.join(map(str, conf_folders()))}")
    terminal.say(f"python: {sys.executable}")
    terminal.say("versions: " + ", ".join(f"{name} {text}" for name, text in versions().items()))
    return 0
