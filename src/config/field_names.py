"""The fields and options that can be typed, read from the files in conf/ without their schema.

Composing the names alone takes a tenth of a second and imports neither PyTorch nor the parts that a
configuration describes, so that a mistyped name is answered at once.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf

from src.common.errors import InputError
from src.common.override_grammar import GROUPS, Override, parse
from src.common.read_checkpoint import EXTERNAL
from src.config.field_roles import role_of
from src.config.hydra_compose import composed_config, conf_folders, is_own_option

COMPOSED = ("train", "describe")
"""Commands that compose a run. All others have fields of their own."""

_SCHEMA = re.compile(r"- /(schema/\w+)/(\w+)@")


def check_groups(typed: Sequence[Override]) -> None:
    """Raises InputError if a group is given a mapping, or a list where it takes one option."""
    for override in typed:
        if override.key in GROUPS and override.text.startswith("{"):
            # The value is not repeated: it could hold a password (tracking).
            raise InputError(
                f"{override.key}={{...}}: must be the name of an option; set its fields as"
                f" {override.key}.<field>=<value>"
            )
        several = override.text.startswith("[")
        if several and override.key in GROUPS and override.key != "stability":
            raise InputError(f"{override.key}={override.text}: must be one option, not a list")
        options = override.text[1:-1].split(",") if several else []
        if override.key == "stability" and "none" in options:
            raise InputError(
                f"stability={override.text}: none cannot be combined with other remedies"
            )
        if len(set(options)) < len(options):
            raise InputError(f"stability={override.text}: names a remedy twice; once is enough")


def external_parts(typed: Sequence[Override]) -> list[str]:
    """Overrides that choose attention=external and ffn=external, whatever a preset says.

    Raises:
        InputError: the user typed other parts.
    """
    last = {override.key: override.text for override in typed}
    if last.get("model") != EXTERNAL:
        return []
    for group in ("attention", "ffn"):
        if last.get(group, EXTERNAL) != EXTERNAL:
            raise InputError(f"{group}={last[group]}: model={EXTERNAL} has its own; leave it out")
    return [f"{group}={EXTERNAL}" for group in ("attention", "ffn") if group not in last]


def fields_of(config_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The composed fields of a command, nested, with values that are not checked or resolved.

    Args:
        config_name: the command's file in conf/.
        arguments: of these only the choices of groups are used.

    Raises:
        Exceptions of Hydra and OmegaConf, which `readable` turns into one line.
    """
    chosen: list[str] = []
    if config_name in COMPOSED:
        stand_in_for_schema()
        typed = parse(arguments)
        chosen = [a for a, o in zip(arguments, typed, strict=True) if o.key in GROUPS]
        chosen += external_parts(typed)
    composed = composed_config(config_name, chosen)
    del composed["hydra"]
    fields = OmegaConf.to_container(composed, resolve=False, throw_on_missing=False)
    assert isinstance(fields, dict)
    # With the schema, remedies that are off are there as null.
    if isinstance(fields.get("stability"), dict):
        fields["stability"] = {k: v for k, v in fields["stability"].items() if v is not None}
    return {str(name): value for name, value in fields.items()}


def remedies_of(option: str) -> list[str]:
    """The remedies that an option of `stability` turns on, which a file of the user's own names."""
    if not is_own_option("stability", option):
        return [option]
    return list(fields_of("train", [f"stability={option}"]).get("stability") or {})


def names_in(config_name: str, fields: Mapping[str, Any]) -> list[str]:
    """Dotted names of all groups, sections and fields that a user can type, sections first."""
    names = list(GROUPS) if config_name in COMPOSED else []

    def walk(prefix: str, value: object) -> None:
        if prefix not in names:
            names.append(prefix)
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)

    for name, value in fields.items():
        walk(name, value)
    return [name for name in names if role_of(name).typed]


def stand_in_for_schema() -> None:
    """Registers an empty schema for each that conf/ names, unless the real one is registered."""
    store = ConfigStore.instance()
    files = [file for conf in conf_folders() for file in conf.glob("*/*.yaml")]
    named = {found for file in files for found in _SCHEMA.findall(file.read_text("utf-8"))}
    for group, name in [*sorted(named), *(("", f"schema_{command}") for command in COMPOSED)]:
        try:
            store.load(f"{group}/{name}.yaml" if group else f"{name}.yaml")
        except ConfigLoadError:
            store.store(group=group or None, name=name, node={})
