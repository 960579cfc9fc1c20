"""From a command line with several values to the list of its runs."""

import hashlib
from collections.abc import Sequence

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from src import cli
from src.config import CONF, RunConfig


def expand(config_name: str, arguments: Sequence[str]) -> list[RunConfig]:
    """Every cell of a sweep, composed and checked, before anything is trained.

    Unless it is typed, the study is named after the cells.

    Raises:
        InputError: any cell is bad input.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        # The loader lets glob(*) list a group's options.
        with cli.readable(config_name, arguments):
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(
                list(arguments)
            )
            batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    cells = [list(cell) for batch in batches for cell in batch]
    if not any(argument.startswith("study=") for argument in arguments):
        digest = hashlib.sha256("\n".join(" ".join(cell) for cell in cells).encode()).hexdigest()
        cells = [[*cell, f"study=sweep-{digest[:8]}"] for cell in cells]
    configs = [cli.checked(config_name, cell) for cell in cells]
    for config in configs:
        config.trainer.check_device()
    return configs
