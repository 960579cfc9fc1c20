"""The command `python -m src.lab docs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.cli import command_line
from src.cli.field_checks import given_path
from src.common import terminal
from src.config.hydra_compose import CONF
from src.lab.docs.configuration_page import configuration_page

PAGE = CONF.parent / "docs" / "configuration.md"


def write_docs(given: Mapping[str, Any]) -> int:
    """Writes the page; returns the exit code.

    Raises:
        InputError: `out` is not a file.
    """
    file: Path = PAGE if given["out"] is None else given_path(given, "out")
    file.write_text(configuration_page(), encoding="utf-8")
    terminal.say(f"wrote {file}")
    return command_line.OK
