"""Runs the cells of a sweep one after the other."""

from collections.abc import Sequence

from src import cli, terminal
from src.errors import InputError
from src.run.lifecycle import run
from src.sweep.plan import expand


def sweep(config_name: str, arguments: Sequence[str]) -> int:
    """Trains every cell; one that fails does not keep the others from running."""
    configs = expand(config_name, arguments)
    failed = []
    for number, config in enumerate(configs, start=1):
        terminal.say(f"[{number}/{len(configs)}] {config.folder}")
        try:
            code = run(config)
        except InputError as error:
            terminal.error(str(error))
            code = cli.BAD_INPUT
        if code > cli.BAD_INPUT:
            return code
        if code != cli.OK:
            failed.append(str(config.folder))
    if failed:
        terminal.error(f"{len(failed)} of {len(configs)} runs failed: {', '.join(failed)}")
        return cli.FAILURE
    return cli.OK
