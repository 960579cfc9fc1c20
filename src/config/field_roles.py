"""The role of each field of a run's configuration: what it affects, in one table.

A field that is not listed has the role of its section. A section that is not listed has the default
role: it changes numbers, so it enters the hash, the folder's name and MLflow. This module imports
nothing heavy, so that reading old runs does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from src.common.nested_values import value_at


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a field affects. The defaults fit a field that changes the numbers of a run."""

    hashed: Literal["value", "content", "no"] = "value"
    """How the field enters the hash. value: as written in config.yaml; content: by what it refers
    to, such as the text of the data, see `RunConfig.config_hash`; no: not at all."""
    named: bool = True
    """Whether a typed value becomes part of the variant's name, the folder above seed-<n>."""
    typed: bool = True
    """Whether a user can type it; config.yaml also holds entries that are only recorded there."""
    is_replicate: bool = False
    """Whether it only distinguishes the runs of one arm."""
    inherited: bool = True
    """Whether a branch inherits the value that was typed for its source."""
    must_match: bool = False
    """Whether a branch must have the same value as its source, because otherwise the saved state
    would not fit."""
    identifies_sweep: bool = True
    """Whether a different typed value makes a different sweep."""
    set_by: tuple[str, ...] = ()
    """What may set it: the groups whose options can, and init."""

    @property
    def is_hashed(self) -> bool:
        """Whether the field's value, or what it refers to, enters the hash."""
        return self.hashed != "no"

    @property
    def is_param(self) -> bool:
        """Whether MLflow shows the field as a param of the run."""
        return self.is_hashed and self.typed

    @property
    def makes_arm(self) -> bool:
        """Whether arms of a study can differ in this field."""
        return self.is_hashed and not self.is_replicate


_RECORDED_ONLY = Role(hashed="no", named=False, typed=False)
_NOT_OF_SWEEP = Role(hashed="no", named=False, inherited=False, identifies_sweep=False)
_OF_THIS_RUN = Role(hashed="no", named=False, inherited=False)

ROLES: dict[str, Role] = {
    "attention": Role(must_match=True, set_by=("model", "preset", "init")),
    "ffn": Role(must_match=True, set_by=("model", "preset", "init")),
    # A branch may have a different router: the parts of its state that fit are restored.
    "ffn.router": Role(set_by=("model", "preset", "init")),
    "model": Role(must_match=True, set_by=("preset", "init")),
    # Sizes that a part uses are hashed with that part; unused ones change nothing.
    "model.sizes": Role(hashed="no"),
    "model.source": Role(typed=False, must_match=True),
    "tokenizer": Role(hashed="content", must_match=True, set_by=("preset", "init")),
    "data": Role(hashed="content", must_match=True, set_by=("preset",)),
    "poison": Role(set_by=("preset",)),
    "seed": Role(named=False, is_replicate=True, must_match=True),
    "repeat": Role(named=False, is_replicate=True, inherited=False),
    "recipe": Role(set_by=("preset",)),
    # The schedule, and the optimizer's parameter groups and state, depend on these.
    "recipe.max_steps": Role(must_match=True, set_by=("preset",)),
    "recipe.weight_decay": Role(must_match=True, set_by=("preset",)),
    "recipe.decay_params": Role(must_match=True, set_by=("preset",)),
    "recipe.fused": Role(must_match=True, set_by=("preset",)),
    "recipe.checkpoint_every": Role(hashed="no", named=False),
    "stability": Role(inherited=False),
    "guard": Role(),
    "trainer": Role(hashed="content"),
    "trainer.strategy": Role(hashed="no"),
    "trainer.devices": Role(hashed="no", named=False),
    "trainer.activation_checkpointing": Role(hashed="no", named=False),
    "compile": Role(hashed="content"),
    "init": Role(hashed="content"),
    # `RunConfig.config_hash` adds the fork to the hash if the branch would differ from the same
    # configuration trained from step 0.
    "fork": _OF_THIS_RUN,
    "save_at": _OF_THIS_RUN,
    "validate_at": _OF_THIS_RUN,
    "observe": _OF_THIS_RUN,
    "resume": _OF_THIS_RUN,
    "format": _OF_THIS_RUN,
    "rerun": _NOT_OF_SWEEP,
    "audit": _OF_THIS_RUN,
    "study": _NOT_OF_SWEEP,
    "paths": _NOT_OF_SWEEP,
    "tracking": _NOT_OF_SWEEP,
    "watch": Role(hashed="no", named=False, identifies_sweep=False),
    "kinds": Role(named=False, typed=False),
    "choices": _RECORDED_ONLY,
    "arguments": _RECORDED_ONLY,
    "notes": _RECORDED_ONLY,
    "config_hash": _RECORDED_ONLY,
}


OFF: dict[str, Any] = {
    "attention.gated": False,
    "attention.softcap": None,
    "ffn.router.softcap": None,
    "ffn.swiglu_limit": None,
    "model.head_softcap": None,
}
"""Fields that early versions did not have, with the value that means off. A field at this value is
left out of config.yaml, the hash and MLflow, so that those of earlier runs stay valid."""


def without_off(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section, without those of `OFF` that are off."""
    kept = {}
    for name, value in values.items():
        field = f"{section}.{name}"
        if field in OFF and value == OFF[field]:
            continue
        has_off = any(other.startswith(f"{field}.") for other in OFF)
        kept[name] = without_off(field, value) if has_off else value
    return kept


def switched_on(parts: Mapping[str, Any]) -> str | None:
    """The first field of `OFF` that is on, as `field=value`; None if all are off."""
    for field, off in OFF.items():
        try:
            value = value_at(parts, field)
        except AttributeError:
            continue
        if value != off:
            return f"{field}={value}"
    return None


def role_of(field: str) -> Role:
    """The role of a dotted field: its own, or that of the nearest listed section above it."""
    while field not in ROLES and "." in field:
        field = field.rpartition(".")[0]
    return ROLES.get(field, Role())


def hashed_fields(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section of config.yaml that enter the hash."""
    return {k: v for k, v in values.items() if role_of(f"{section}.{k}").is_hashed}


def set_by(choice: str) -> list[str]:
    """The sections and fields that an option of the group `choice`, or init, may set."""
    return [name for name, role in ROLES.items() if choice in role.set_by]
