"""Configurations of a sweep's cells, each distinct one composed once."""

import dataclasses
import re
from collections.abc import Sequence

from src.cli import command_line
from src.common.override_grammar import parse
from src.config.field_roles import role_of
from src.config.run_config import RunConfig


class Composer:
    """Composes and checks, and remembers: it takes a tenth of a second, and a sweep has many seeds.

    Args:
        config_name: the command's file in conf/.
    """

    def __init__(self, config_name: str) -> None:
        self._config_name = config_name
        self._known: dict[tuple[str, ...], RunConfig] = {}

    def config(self, arguments: Sequence[str]) -> RunConfig:
        """The configuration of one cell.

        Raises:
            InputError: it is bad input.
        """
        typed = parse(arguments)
        own = {o.key: o.text for o in typed if role_of(o.key).is_replicate}
        others = tuple(a for a, o in zip(arguments, typed, strict=True) if o.key not in own)
        known = self._known.get((*sorted(own), *others))
        # Whatever is no plain number, or typed twice, is composed and so checked.
        plain = all(re.fullmatch(r"\d{1,18}", text) for text in own.values())
        if known is None or not plain or len(others) + len(own) < len(arguments):
            found = command_line.checked(self._config_name, arguments)
            # What a fork inherits may hang on the seed.
            if found.fork is None and plain:
                self._known[*sorted(own), *others] = found
            return found
        return dataclasses.replace(
            known,
            arguments=list(arguments),
            seed=int(own.get("seed", known.seed)),
            repeat=int(own.get("repeat", known.repeat)),
        )
