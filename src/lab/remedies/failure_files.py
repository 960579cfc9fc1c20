"""Failures that remedies are tried on: a YAML file each, and the sweeps that they make."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.cli.name_checks import check_names, unknown_option
from src.common.errors import InputError
from src.common.override_grammar import file_arguments, parse
from src.config.compose import compose
from src.config.hydra_compose import option_names
from src.config.remedy_overrides import apply_remedy_overrides
from src.config.run_config import SECTIONS, RunConfig

NONFINITE, LOSS, NOTHING = "nonfinite", "loss", "nothing"

SHOWS_AS = (NONFINITE, LOSS, NOTHING)

CONTROL = "shaken_full"
"""The A/A control that each sweep contains, beside the untreated runs."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One way in which training goes wrong, or a healthy configuration, where nothing does."""

    name: str
    """The name of the file without .yaml."""
    shows_as: str
    """nonfinite: runs become NaN or infinite; loss: they end with a higher loss than healthy runs;
    nothing: nothing is wrong, and remedies can only cost something."""
    says: str
    """What goes wrong, in one sentence."""
    reports: str
    """Where it is known from; empty if nothing is wrong."""
    arguments: tuple[str, ...]
    """What `python -m src.train` is given; usually a preset."""
    healthy: tuple[str, ...]
    """Further arguments, which take the cause away; empty if nothing is wrong."""
    repeats: str | None = None
    """The failure that this one repeats under other conditions, to see whether the ranking of the
    remedies holds; None: it stands on its own."""
    seeds: str | None = None
    """The value of `seed` in Hydra's grammar, in place of that of the study."""


def read_failure(file: Path) -> Failure:
    """Reads the file of a failure.

    Raises:
        InputError: it cannot be read, or a field is missing, unknown or wrong.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error
    fields, optional = ["shows_as", "says", "reports", "arguments", "healthy"], ["repeats", "seeds"]
    if not isinstance(content, Mapping) or set(content) - set(optional) != set(fields):
        raise InputError(
            f"{file}: must have the fields {', '.join(fields)}, may have {' and '.join(optional)},"
            " and no others"
        )
    if content["shows_as"] not in SHOWS_AS:
        raise InputError(
            f"{file}: shows_as={content['shows_as']}: must be one of {', '.join(SHOWS_AS)}"
        )
    for field in ("arguments", "healthy"):
        if not isinstance(content[field], list):
            raise InputError(f"{file}: {field}={content[field]}: must be a list of field=value")
    if bool(content["healthy"]) == (content["shows_as"] == NOTHING):
        raise InputError(
            f"{file}: healthy={content['healthy']}: must say what takes the cause away, and be"
            " empty for shows_as=nothing"
        )
    return Failure(
        name=file.stem,
        shows_as=content["shows_as"],
        says=str(content["says"]),
        reports=str(content["reports"]),
        arguments=tuple(file_arguments(list(map(str, content["arguments"])), where=str(file))),
        healthy=tuple(file_arguments(list(map(str, content["healthy"])), where=str(file))),
        **{name: str(content[name]) for name in optional if name in content},
    )


def read_failures(folder: Path, names: Sequence[str]) -> list[Failure]:
    """The failures of a study, which are files in the folder `failures` of its own folder.

    Raises:
        InputError: a file is missing or wrong.
    """
    found = [read_failure(folder / "failures" / f"{name}.yaml") for name in names]
    for failure in found:
        if failure.repeats is not None and failure.repeats not in names:
            raise InputError(
                f"{folder}: {failure.name} repeats={failure.repeats}: must be one of"
                f" {', '.join(names)}"
            )
    return found


def sweeps_of(failure: Failure, *, remedies: Sequence[str], seeds: str) -> list[list[str]]:
    """The arguments of the sweeps with a failure: that of all remedies, and of healthy runs.

    Args:
        failure: the failure.
        remedies: options of `stability`; those that do not fit the failure's model, or change
            nothing in it, are left out.
        seeds: the value of `seed` in Hydra's grammar; a failure with seeds of its own keeps them.

    Raises:
        InputError: the failure's arguments are wrong.
    """
    for name in remedies:
        if name not in option_names("stability"):
            raise unknown_option("stability", name)
    for arguments in (failure.arguments, (*failure.arguments, *failure.healthy)):
        check_names("train", arguments)
        _composed(arguments)
    fitting = [name for name in remedies if fits(failure.arguments, name)]
    options = ",".join(["none", CONTROL, *fitting])
    # Recording an incident takes longer than one of these runs.
    last = ["watch.incidents=false", f"seed={failure.seeds or seeds}"]
    # The looks decide by failing runs, so of a failure that shows in the loss all runs are needed.
    looks = ["sequential=true"] if failure.shows_as == NONFINITE else []
    found = [[*failure.arguments, f"stability={options}", *looks, *last]]
    if failure.healthy:
        found.append([*failure.arguments, *failure.healthy, "stability=none", *last])
    return found


@functools.cache
def fits(arguments: tuple[str, ...], remedy: str) -> bool:
    """Whether a remedy can be combined with a configuration, and changes something in it.

    Composing each pair of a failure and a remedy would take minutes, so each is composed once.
    """
    config = _composed(arguments)
    parts = {name: getattr(config, name) for name in SECTIONS if name != "stability"}
    remedies = _composed(("preset=calm", f"stability={remedy}")).remedies
    try:
        return not apply_remedy_overrides(parts, remedies, parse(arguments))
    except InputError:
        return False


@functools.cache
def _composed(arguments: tuple[str, ...]) -> RunConfig:
    return compose("train", arguments)


def sweeps_of_study(folder: Path, plan: Mapping[str, Any]) -> list[list[str]]:
    """The sweeps of a study whose study.yaml lists failures, remedies and seeds."""
    return [
        sweep
        for failure in read_failures(folder, plan["failures"])
        for sweep in sweeps_of(failure, remedies=plan["remedies"], seeds=str(plan["seeds"]))
    ]
