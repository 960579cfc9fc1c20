"""Composes the configurations of a sweep's runs, each distinct one only once."""

import dataclasses
import re
from collections.abc import Sequence

from src.cli import command_line
from src.common.override_grammar import parse
from src.config.field_roles import role_of
from src.config.run_config import RunConfig


class Composer:
    """Composes configurations and caches them without seed and repeat.

    Composing takes a tenth of a second, and most runs of a sweep differ in their seed only.

    Args:
        config_name: the command's file in conf/.
    """

    def __init__(self, config_name: str) -> None:
        self._config_name = config_name
        self._cache: dict[tuple[str, ...], RunConfig] = {}

    def config(self, arguments: Sequence[str]) -> RunConfig:
        """The configuration of one run.

        Raises:
            InputError: there is a mistake in the arguments.
        """
        typed = parse(arguments)
        replicate = {o.key: o.text for o in typed if role_of(o.key).is_replicate}
        others = tuple(a for a, o in zip(arguments, typed, strict=True) if o.key not in replicate)
        cached = self._cache.get((*sorted(replicate), *others))
        # A seed that is not a plain number, or is typed twice, must be composed to be checked.
        are_numbers = all(re.fullmatch(r"\d{1,18}", text) for text in replicate.values())
        if cached is None or not are_numbers or len(others) + len(replicate) < len(arguments):
            config = command_line.checked(self._config_name, arguments)
            # Not cached with a fork, because what a branch inherits may depend on the seed.
            if config.fork is None and are_numbers:
                self._cache[*sorted(replicate), *others] = config
            return config
        return dataclasses.replace(
            cached,
            arguments=list(arguments),
            seed=int(replicate.get("seed", cached.seed)),
            repeat=int(replicate.get("repeat", cached.repeat)),
        )
