"""The fields of a run, with all that the page says about each."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.common.errors import InputError
from src.common.override_grammar import GROUPS
from src.config.compile_choice import CHOICES
from src.config.compose import compose
from src.config.field_roles import Role, role_of
from src.config.hydra_compose import CONF, composed_config
from src.config.run_config import RunConfig
from src.lab.docs.find_ranges import fields_of, in_words, kind_of, range_of
from src.lab.docs.read_fields import (
    REQUIRED,
    comments,
    docstrings,
    options,
    typed_value,
    values_set_by,
)
from src.stability import REMEDIES

PLACEHOLDERS: dict[str, Any] = {
    "data.path": "text.txt",
    "tokenizer.path": "runs/single/mlha+moe+none/seed-0",
    "tokenizer.vocab_size": 1000,
    "model.target": "package.module:build",
}
"""Values for fields that must be typed, to compose without them."""

GENERAL_PROBES = {
    "seed": ("-1",),
    "repeat": ("-1",),
    "save_at": ("[0]",),
    "validate_at": ("[-1]",),
    "study": ("a/b",),
}
"""Wrong values of fields outside sections, whose checks are in `compose`."""


ASKED_WITH = {
    "trainer.devices": ("trainer=ddp",),
    "stability.ema.horizon_frac": (
        *("stability=ema", "stability.ema.decay=null", "stability.ema.horizon_frac=0.1"),
    ),
}
"""Overrides under which the range of a field is asked for, where the default allows one value."""


@dataclass(frozen=True, kw_only=True)
class FieldRow:
    """What the page says about a field."""

    name: str
    """As it is typed."""
    default: str
    """The value of the default configuration."""
    source: str | None
    """The other field that the default is taken from; None: none."""
    values: str
    """What it may hold, in words."""
    meaning: str
    """What it does."""
    changed_by: dict[str, str]
    """The options that give it another value: that value by <group>=<option>."""
    remedies: tuple[str, ...]
    """The remedies that set it."""

    @property
    def role(self) -> Role:
        """What it affects."""
        return role_of(self.name)


@functools.cache
def composed(*arguments: str) -> DictConfig:
    """The composed configuration of src.train, unchecked."""
    found = composed_config("train", arguments)
    del found["hydra"]
    return found


@functools.cache
def remedy_fields() -> dict[str, tuple[str, ...]]:
    """The remedies that set each field outside their own section, by that field."""
    found: dict[str, list[str]] = {}
    parts = _parts(())
    for name in REMEDIES:
        remedy: Any = OmegaConf.to_object(composed(f"stability={name}").stability[name])
        for field in remedy.config_overrides(parts):
            found.setdefault(field, []).append(name)
    return {field: tuple(names) for field, names in found.items()}


def section_rows(path: str, *arguments: str) -> list[FieldRow]:
    """The fields of a section of the configuration.

    Args:
        path: the section, such as recipe, or stability.ema.
        arguments: overrides that select an option, such as attention=gqa.
    """
    raw = OmegaConf.to_container(composed(*arguments), resolve=False)
    part = _part(path, arguments)
    texts = docstrings(type(part))
    rows = []
    for field, annotation in fields_of(part):
        name = f"{path}.{field}"
        owner, _, short = field.rpartition(".")
        text = texts if not owner else docstrings(type(getattr(part, owner)))
        asked = _part(path, ASKED_WITH[name]) if name in ASKED_WITH else part
        values = range_of(asked, field, annotation, _check(path))
        meaning = text.get(short) or comments(CONF / "base.yaml").get(name, "")
        rows.append(_row(name, raw, arguments, values=values, meaning=meaning))
    return rows


def general_rows(names: Sequence[str]) -> list[FieldRow]:
    """Fields outside sections, such as seed."""
    raw = OmegaConf.to_container(composed(), resolve=False)
    texts, notes = docstrings(RunConfig), comments(CONF / "base.yaml")
    kinds = {field.name: field.type for field in dataclasses.fields(RunConfig)}
    rows = []
    for name in names:
        reasons = list(filter(None, (_rejection(name, v) for v in GENERAL_PROBES.get(name, ()))))
        if name == "compile":
            values = ", ".join(CHOICES)
        elif name in ("init", "fork", "observe", "resume"):
            values = ""  # the meaning says it
        else:
            kind, can_be_null = kind_of(kinds[name])
            values = in_words(kind, reasons, can_be_null=can_be_null)
        meaning = notes.get(name) or texts[name]
        rows.append(_row(name, raw, (), values=values, meaning=meaning))
    return rows


def _row(name: str, raw: Any, arguments: Sequence[str], *, values: str, meaning: str) -> FieldRow:
    value = _at(raw, name)
    source = None
    if isinstance(value, str) and value.startswith("${"):
        source = value[2:-1]
        value = _at(OmegaConf.to_container(composed(*arguments), resolve=True), name)
    changed = {}
    for group in GROUPS if not name.startswith("stability.") else ():
        for option in options(group):
            other = values_set_by(group, option).get(name, value)
            if other in (REQUIRED, _at(raw, name)) or _number(other) == _number(value):
                continue
            # The fields of another part are in a table of their own.
            if group == "preset" or option_config(group, option) is option_config(
                group, *arguments
            ):
                changed[f"{group}={option}"] = typed_value(other)
    return FieldRow(
        name=name,
        default="" if value == REQUIRED else typed_value(value),
        source=source,
        values=values,
        meaning=meaning,
        changed_by=changed,
        remedies=remedy_fields().get(name, ()),
    )


def option_config(group: str, *choice: str) -> Any:
    """The dataclass of a section, by an option of its group or by arguments that select one."""
    arguments = [one if "=" in one else f"{group}={one}" for one in choice]
    return OmegaConf.get_type(composed(*arguments)[group])


def _at(values: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        values = values[name]
    return values


def _number(value: Any) -> Any:
    """The value, with numbers that YAML reads as text, such as 1e-3, as numbers."""
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _part(path: str, arguments: tuple[str, ...]) -> Any:
    """The dataclass of a section, with placeholders for values that must be typed."""
    node = copy.deepcopy(composed(*arguments))
    for field, value in PLACEHOLDERS.items():
        section, _, name = field.rpartition(".")
        if section == path and OmegaConf.is_missing(node[section], name):
            node[section][name] = value
    for name in path.split("."):
        node = node[name]
    return OmegaConf.to_object(node)


def _parts(arguments: tuple[str, ...]) -> Mapping[str, Any]:
    node = composed(*arguments)
    sections = ("attention", "ffn", "model", "recipe", "guard", "trainer")
    return {name: OmegaConf.to_object(node[name]) for name in sections}


def _check(path: str) -> Callable[[Any], None] | None:
    """The rules between a part and the default model."""
    if path != "attention":
        return None
    dims = _parts(())["model"].dims()
    return lambda part: part.check(dims)


def _rejection(name: str, value: str) -> str | None:
    """What `compose` says to a wrong value of a field."""
    try:
        compose("train", [f"{name}={value}"])
    except InputError as error:
        reason = str(error).partition(": ")[2].removeprefix("must be ")
        return reason.replace(str(composed().recipe.max_steps), "recipe.max_steps")
    raise AssertionError(f"{name}={value} is allowed")
