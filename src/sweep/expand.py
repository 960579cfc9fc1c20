"""Which runs a command line with several values stands for, and an early check of their names.

This module imports nothing heavy, so that a mistyped name is answered at once.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride

from src.cli.command_line import check_early
from src.cli.hydra_errors import readable
from src.cli.name_checks import is_sweep_field, unknown_option
from src.cli.value_checks import check_kinds
from src.common.errors import InputError
from src.common.override_grammar import GROUPS, parse
from src.config.field_names import remedies_of
from src.config.hydra_compose import hydra_on_conf, option_names
from src.sweep.settings import SweepSettings, compose_settings


def read_sweep(arguments: Sequence[str]) -> tuple[SweepSettings, list[str]]:
    """The settings of a sweep, and the arguments of its runs, which may have several values.

    Raises:
        InputError: there is a mistake in an argument of the sweep itself.
    """
    own = [a for a in arguments if is_sweep_field(a)]
    settings = compose_settings(own)
    typed = [a for a in arguments if a not in own]
    keys = {key_of(a) for a in typed}
    return settings, [a for a in settings.axes if key_of(a) not in keys] + typed


def check_sweep(config_name: str, arguments: Sequence[str]) -> None:
    """Raises InputError for a mistake in a name or in a number, without PyTorch.

    Fields are checked in the first run alone, because a field that does not exist is typed for all
    runs. Options and the values of fields are checked in all of them.
    """
    settings, swept = read_sweep(arguments)
    runs = expand(config_name, swept)
    with naming_experiment(settings, arguments):
        with readable(config_name, swept):
            typed = [(o.key, o.text) for run in runs for o in parse(run) if o.key in GROUPS]
        for group, text in dict.fromkeys(typed):
            for option in text.strip("[]").split(","):
                if text != "null" and option not in option_names(group):
                    raise unknown_option(group, option)
        fields = check_early(config_name, runs[0])
        others = list(dict.fromkeys(a for run in runs for a in run if a not in runs[0]))
        with readable(config_name, others):
            check_kinds(fields, others)


@contextlib.contextmanager
def naming_experiment(settings: SweepSettings, arguments: Sequence[str]) -> Iterator[None]:
    """Says in an InputError about an argument of the experiment that it comes from there."""
    try:
        yield
    except InputError as error:
        typed = {key_of(a) for a in arguments}
        if key_of(str(error)) not in {key_of(a) for a in settings.axes} - typed:
            raise
        raise InputError(f"experiment={settings.experiment}: sets {error}") from error


def key_of(argument: str) -> str:
    """The field of an argument `field=value`."""
    return argument.partition("=")[0].strip()


def expand(config_name: str, arguments: Sequence[str]) -> list[list[str]]:
    """The arguments of each run: the product of all fields with several values.

    Args:
        config_name: the command's file in conf/.
        arguments: those of `read_sweep`.

    Raises:
        InputError: an argument cannot be read, or there is no run.
    """
    with hydra_on_conf():
        loader = GlobalHydra.instance().config_loader()
        # The parser needs the loader to resolve glob(*) into the options of a group.
        with readable(config_name, arguments):
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(
                [a for a in arguments if key_of(a) != "rerun"]
            )
            # If a field is typed twice, the last one counts, as in a single run.
            axes = {override.get_key_element(): _values(override) for override in overrides}
    cells = [list(cell) for cell in itertools.product(*axes.values())]
    if not cells:
        empty = [a for a in arguments if "glob(" in a]
        raise InputError(f"{' '.join(empty)}: matches no option; there is nothing to sweep")
    return _without_fields_of_absent_remedies(cells)


def _values(override: HydraOverride) -> list[str]:
    """The arguments `field=value` that one argument of a sweep stands for."""
    key = override.get_key_element()
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise InputError(f"{override.input_line}: must be a list of values, such as a,b")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def _remedies(cell: Sequence[str]) -> set[str]:
    """The names of the remedies that a run selects."""
    chosen = [override.text for override in parse(cell) if override.key == "stability"]
    options = chosen[-1].strip("[]").split(",") if chosen else []
    return {remedy for option in options for remedy in remedies_of(option)}


def _without_fields_of_absent_remedies(cells: list[list[str]]) -> list[list[str]]:
    """Keeps a field of a remedy only in the runs that have the remedy, if any run has it."""
    swept = set().union(*map(_remedies, cells))

    def belongs(argument: str, cell: Sequence[str]) -> bool:
        section, _, rest = key_of(argument).partition(".")
        remedy = rest.partition(".")[0]
        return section != "stability" or remedy not in swept or remedy in _remedies(cell)

    kept = [[a for a in cell if belongs(a, cell)] for cell in cells]
    return [list(cell) for cell in dict.fromkeys(tuple(cell) for cell in kept)]
