"""Composes and checks the configuration of a run from the arguments of a command line."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.checkpoint.init_from import Init, adopt, check_fit, options_of
from src.common.errors import InputError
from src.common.override_grammar import GROUPS, Override, parse
from src.common.run_folder import MAX_NAME, check_study
from src.common.tracking_address import check_address, default_uri
from src.config.compile_choice import is_compiled
from src.config.field_names import check_groups, external_parts
from src.config.fork import parse_fork, with_inherited
from src.config.hydra_compose import check_integers, choices_of, composed_config
from src.config.own_options import check_schemas, fields_set_by_own_remedies
from src.config.remedy_overrides import apply_remedy_overrides, observers_of
from src.config.run_config import RunConfig
from src.config.schema import Schema
from src.config.variant_name import MAX_PATH, ROOM, variant_name, variant_of
from src.external.model import check_parts
from src.model.architecture import ModelParts


def compose(config_name: str, arguments: Sequence[str]) -> RunConfig:
    """Composes and checks the configuration of one run.

    Args:
        config_name: the command's file in conf/.
        arguments: overrides in Hydra's grammar, without sweeps.

    Raises:
        InputError: one line, for any mistake in the arguments.
    """
    arguments = with_inherited(parse(arguments), arguments)
    typed = parse(arguments)
    check_groups(typed)
    init, brought = initial(config_name, arguments, typed)
    selecting = [*brought, *external_parts(typed), *arguments]
    composed = composed_config(config_name, selecting)
    check_schemas(composed)
    named = [*fields_set_by_own_remedies(config_name, selecting, composed), *typed]
    choices = choices_of(composed)
    parts = _to_objects(composed)
    if init is None and parts["init"] is not None:
        raise InputError(
            f"init={parts['init']}: a preset cannot set init; type it on the command line"
        )
    parts["init"] = init
    check_parts(parts)
    if init is not None:
        adopt(init, parts, choices, typed)
    known = {field.name for field in dataclasses.fields(Schema)}
    extra = {name: parts.pop(name) for name in list(parts) if name not in known}
    stability = parts.pop("stability")
    remedies = {
        field.name: getattr(stability, field.name)
        for field in dataclasses.fields(stability)
        if getattr(stability, field.name) is not None
    }
    notes = apply_remedy_overrides(parts, remedies, typed)
    parts["ffn"] = parts["ffn"].resolved(max_steps=parts["recipe"].max_steps)
    if init is not None:
        sizes = {name: parts[name] for name in ("model", "attention", "ffn")}
        whole = ModelParts(**sizes, seq_len=parts["recipe"].seq_len)
        notes += check_fit(init, whole, typed)
    parts["fork"] = parse_fork(parts["fork"])
    parts["observers"] = observers_of(parts.pop("observe"), remedies)
    variant = variant_of(choices, remedies)
    asked = parts.pop("compile")
    config = RunConfig(
        **parts,
        compile=False,
        remedies=remedies,
        variant=variant,
        arguments=arguments,
        variant_name=variant_name(variant, choices, named),
        choices={group: str(choices[group]) for group in GROUPS if choices.get(group)},
        notes=notes,
        extra=extra,
    )
    _check_across(config)
    compiled = is_compiled(asked, config.architecture, config.recipe, config.trainer)
    config = dataclasses.replace(config, compile=compiled)
    if config.fork is not None and config.is_branch:
        name = f"{config.variant_name}@fork-{config.fork.step}"
        return dataclasses.replace(config, variant_name=name)
    return config


def initial(
    config_name: str, arguments: Sequence[str], typed: Sequence[Override]
) -> tuple[Init | None, list[str]]:
    """The saved model that `init` names, and the overrides that select its options.

    Returns (None, []) without `init`.
    """
    if not any(override.key == "init" for override in typed):
        return None, []
    # Fields of options are left out: Hydra knows them only once the options are selected.
    early = [
        argument
        for argument, override in zip(arguments, typed, strict=True)
        if override.key in (*GROUPS, "init")
    ]
    composed = composed_config(config_name, early)
    if composed.init is None:
        return None, []
    if not composed.init:
        raise InputError("init=: must be a folder, a checkpoint or null")
    init = Init(path=str(composed.init))
    defaults = choices_of(composed_config(config_name, []))
    return init, options_of(init, typed, choices=choices_of(composed), defaults=defaults)


def _to_objects(composed: DictConfig) -> dict[str, Any]:
    """Turns each section into its dataclass.

    Raises:
        InputError: a section's own check failed; the line begins with the section's name.
    """
    OmegaConf.resolve(composed)
    check_integers({name: composed[name] for name in composed if name != "hydra"})
    parts: dict[str, Any] = {}
    for name in composed:
        if name == "hydra":
            continue
        node = composed[name]
        try:
            is_section = isinstance(node, DictConfig)
            parts[str(name)] = OmegaConf.to_object(node) if is_section else node
        except InputError:
            raise
        except ValueError as error:
            # OmegaConf's own errors are subclasses of ValueError; `readable` translates those.
            if type(error) is not ValueError:
                raise
            # The message of a section's check begins with the field, without the section's name.
            raise InputError(f"{_section_of(str(name), node, error)}.{error}") from error
    return parts


def _section_of(name: str, node: Any, error: ValueError) -> str:
    """The section to name in the error: for stability, the remedy that has the field."""
    if name != "stability":
        return name
    field = str(error).partition("=")[0]
    for option, config in node.items():
        if config is not None and field in config:
            return f"stability.{option}"
    return name


def _check_across(config: RunConfig) -> None:
    """Checks the rules that concern more than one section; raises InputError."""
    try:
        config.architecture.check()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    devices, rows = config.trainer.devices, config.recipe.batch_size
    if rows % devices:
        raise InputError(
            f"trainer.devices={devices}: must divide recipe.batch_size={rows}, because the devices"
            " share the rows of a batch equally"
        )
    check_study(config.study)
    if config.tracking.uri is not None:
        check_address(config.tracking.uri, field="tracking.uri")
    elif config.tracking.mlflow:
        # Called only for its check of MLFLOW_TRACKING_URI in the environment.
        default_uri()
    for field, first in (("save_at", 1), ("validate_at", 0)):
        steps, last = getattr(config, field), config.recipe.max_steps
        if any(not first <= step <= last for step in steps):
            raise InputError(f"{field}={steps}: must be steps from {first} to {last}")
    for field in ("seed", "repeat"):
        if getattr(config, field) < 0:
            raise InputError(f"{field}={getattr(config, field)}: must be at least 0")
    length = len(os.fsencode(config.folder.absolute())) + ROOM
    longest = max(len(os.fsencode(part)) for part in config.folder.parts)
    if length > MAX_PATH or longest > MAX_NAME:
        raise InputError(
            f"paths.runs={str(config.paths.runs)[:40]}...: the path of the run folder is too long"
            f" for the file system (at most {MAX_NAME} bytes a name, {MAX_PATH} in all)"
        )
