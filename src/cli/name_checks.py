"""Checks of names alone, before PyTorch is imported: flags, groups' options, fields."""

from collections.abc import Sequence
from typing import Any

from src.cli.hints import (
    for_deleted,
    for_field,
    for_flag,
    for_hydra,
    for_option,
    for_section,
)
from src.common.errors import InputError, nearest
from src.common.override_grammar import GROUPS, OPEN, parse, parse_all
from src.common.tracking_address import masked
from src.config.field_names import (
    COMPOSED,
    check_groups,
    fields_of,
    names_in,
    remedies_of,
)
from src.config.field_roles import set_by
from src.config.hydra_compose import is_own_option, option_names

GRAMMAR_HINT = "type arguments as field=value; values with spaces or special characters need quotes"

SWEEP_SWITCHES = ("share_prefix", "sequential", "plan")

PRIMARIES = ("failures", "loss")
"""What a study may be about: runs that go non-finite, or the final loss of finite ones."""

SWEEP_FIELDS = ("experiment", "n_jobs", "timeout", "primary", *SWEEP_SWITCHES)
"""Fields of conf/sweep.yaml, which belong to a sweep and not to its runs."""

NOT_OFFERED = {
    "trainer=fsdp": "sharded weights are not supported, because each process reruns a failed step"
    " by itself, which needs all weights; "
}
"""Options that people ask for, and why they do not exist."""


def is_sweep_field(argument: str) -> bool:
    """Whether an argument is for the sweep or its launcher, and not for its runs."""
    key = argument.partition("=")[0].lstrip("+~").strip()
    return key in SWEEP_FIELDS or key.startswith(("hydra/launcher", "hydra.launcher"))


def check_form(config_name: str, arguments: Sequence[str]) -> None:
    """Raises InputError for an argument that is no plain `field=value` of one run."""
    for override in parse_all(arguments):
        line, key = override.input_line or "", override.key_or_group
        if override.is_add() or override.is_force_add() or override.is_delete():
            names = names_in(config_name, fields_of(config_name, []))
            deleted = for_deleted(key) if key in names else None
            hint = (
                deleted if override.is_delete() else for_field(key, line.partition("=")[2], names)
            )
            more = "" if hint is None else f"; {hint}"
            raise InputError(f"{line}: type fields as field=value, without + or ~{more}")
        if is_sweep_field(line):
            raise InputError(f"{line}: is a field of sweeps; add --multirun to start one")
        if key.startswith("hydra"):
            hint = for_hydra(key)
            more = "" if hint is None else f"; {hint}"
            raise InputError(f"{line}: Hydra's own settings cannot be changed{more}")
        if override.is_sweep_override():
            raise InputError(f"{line}: has several values; add --multirun to run each")


def check_names(config_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Raises InputError for an option or a field that does not exist; returns the fields.

    What depends on a saved model, which only PyTorch can read, is left to `compose`.

    Args:
        config_name: the file in conf/ of a command that composes a run.
        arguments: those of one run, without sweeps, with what a branch inherits.
    """
    typed = parse(arguments)
    check_groups(typed)
    for override in typed:
        if override.key in GROUPS and override.text != "null":
            for option in override.text.strip("[]").split(","):
                if option not in option_names(override.key):
                    raise unknown_option(override.key, option)
    fields = fields_of(config_name, arguments)
    names = names_in(config_name, fields)
    from_init = set_by("init") if any(o.key == "init" for o in typed) else []
    for argument, override in zip(arguments, typed, strict=True):
        section, _, rest = override.key.partition(".")
        remedy, _, field = rest.partition(".")
        if section == "stability" and field and remedy not in fields["stability"]:
            raise not_on(override.key, override.text, remedy)
        if section not in from_init and _is_unknown(override.key, names, fields):
            raise unknown_field(config_name, override.key, argument.partition("=")[2], names)
    return fields


def _is_unknown(key: str, names: Sequence[str], fields: object) -> bool:
    """Whether a field does not exist; False also where only its type can tell."""
    if key in names or key.startswith(tuple(f"{field}." for field in OPEN.values())):
        return False
    inner = fields
    for part in key.split("."):
        if not isinstance(inner, dict):
            # Below a list or a value that is null by default.
            return False
        if part not in inner:
            return True
        inner = inner[part]
    return True


def unknown_option(group: str, option: str) -> InputError:
    """The error for an option that its group lacks."""
    # Masked, because a user may have typed an address with a password instead of an option.
    group, option = masked(group), masked(option)
    options = option_names(group) if group else []
    why = NOT_OFFERED.get(f"{group}={option}")
    if why is None:
        hint = for_option(group, option)
        why = f"unknown option; {nearest(option, options) if hint is None else f'{hint}; '}"
    return InputError(f"{group}={option}: {why}allowed: {', '.join(options)}")


def unknown_field(config_name: str, key: str, value: str, names: Sequence[str]) -> InputError:
    """The error for a field that does not exist: what to type, or the nearest and those beside it.

    Args:
        config_name: the command's file in conf/.
        key: the field.
        value: as typed.
        names: all fields and groups of the command.
    """
    # A command that composes no run has no options whose fields these could be.
    elsewhere = for_section(key) if config_name in COMPOSED else None
    if elsewhere is not None:
        return InputError(f"{key}={value}: {elsewhere}; type that as well")
    hint = for_field(key, value, names)
    if hint is not None:
        return InputError(f"{key}: unknown field; {hint}")
    section = key.partition(".")[0]
    top = list(GROUPS) if config_name in COMPOSED else [n for n in names if "." not in n]
    siblings = [name for name in names if name.startswith(f"{section}.")] or top
    return InputError(f"{key}: unknown field; {nearest(key, names)}allowed: {', '.join(siblings)}")


def not_on(key: str, value: str, remedy: str) -> InputError:
    """The error for a field of a remedy that is off, or that does not exist."""
    if is_own_option("stability", remedy):
        field = key.rpartition(".")[2]
        names = " or ".join(f"stability.{name}.{field}" for name in remedies_of(remedy))
        if names and key not in names.split(" or "):
            return InputError(f"{key}={value}: stability={remedy} is a file of yours; type {names}")
    remedies = [option for option in option_names("stability") if option != "none"]
    if remedy not in remedies:
        return InputError(
            f"{key}: unknown remedy; {nearest(remedy, remedies)}allowed: {', '.join(remedies)}"
        )
    return InputError(
        f"{key}={value}: stability={remedy} is not on; type stability={remedy} as well"
    )


def unknown_flag(config_name: str, flag: str, following: str | None) -> InputError:
    """The error for a flag that does not exist.

    Args:
        config_name: the command's file in conf/.
        flag: as typed.
        following: the next argument, which may be meant as its value; None: there is none.
    """
    names = names_in(config_name, fields_of(config_name, []))
    hint = for_flag(flag, following, names) or GRAMMAR_HINT
    return InputError(f"{flag}: unknown flag; {hint}")
