"""What each field of a run's configuration is for: one table, read by everything that must know.

A field that is not listed has its section's role, and a section that is not listed has the default
role: it changes numbers, so it enters the hash, the folder's name and MLflow. This module imports
nothing, so that reading old runs costs no import of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a field is for. The defaults are those of a field that changes numbers."""

    hashed: Literal["value", "content", "no"] = "value"
    """How the field enters the hash: as it is written in config.yaml; by what it refers to, such as
    the text of the data, which `RunConfig.config_hash` computes; or not at all."""
    named: bool = True
    """Whether a typed value becomes part of the run folder's name."""
    typed: bool = True
    """Whether it can be typed; config.yaml also holds entries that are only noted there."""
    is_replicate: bool = False
    """Whether it only distinguishes runs of one arm."""
    inherited: bool = True
    """Whether a branch takes the value that was typed for its source."""
    must_match: bool = False
    """Whether a branch needs the same value as its source, because the saved state would not fit
    another."""
    identifies_sweep: bool = True
    """Whether another typed value makes another sweep."""
    set_by: tuple[str, ...] = ()
    """Other fields whose choice may set it: a group's option, or a saved model."""

    @property
    def is_hashed(self) -> bool:
        """Whether two runs that differ in it are different runs."""
        return self.hashed != "no"

    @property
    def is_param(self) -> bool:
        """Whether MLflow shows it as a param of the run."""
        return self.is_hashed and self.typed

    @property
    def makes_arm(self) -> bool:
        """Whether arms of a study can differ in it."""
        return self.is_hashed and not self.is_replicate


_NOTE = Role(hashed="no", named=False, typed=False)
_PLACE = Role(hashed="no", named=False, inherited=False, identifies_sweep=False)
_OF_THIS_RUN = Role(hashed="no", named=False, inherited=False)

ROLES: dict[str, Role] = {
    "attention": Role(must_match=True, set_by=("model", "preset", "init")),
    "ffn": Role(must_match=True, set_by=("model", "preset", "init")),
    # A branch may have another router: its state is restored where it fits.
    "ffn.router": Role(set_by=("model", "preset", "init")),
    "model": Role(must_match=True, set_by=("preset", "init")),
    # Sizes that no chosen part uses change nothing.
    "model.sizes": _NOTE,
    "model.source": Role(typed=False, must_match=True),
    "tokenizer": Role(hashed="content", must_match=True, set_by=("preset", "init")),
    "data": Role(hashed="content", must_match=True, set_by=("preset",)),
    "seed": Role(named=False, is_replicate=True, must_match=True),
    "repeat": Role(named=False, is_replicate=True, inherited=False),
    "recipe": Role(set_by=("preset",)),
    # The optimizer's state, and its groups of parameters, depend on these.
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
    # `RunConfig.config_hash` adds it to the hash where the branch makes other numbers than the same
    # configuration makes from nothing.
    "fork": _OF_THIS_RUN,
    "save_at": _OF_THIS_RUN,
    "validate_at": _OF_THIS_RUN,
    "observe": _OF_THIS_RUN,
    "resume": _OF_THIS_RUN,
    "format": _OF_THIS_RUN,
    "rerun": _PLACE,
    "study": _PLACE,
    "paths": _PLACE,
    "tracking": _PLACE,
    "watch": Role(hashed="no", named=False, identifies_sweep=False),
    "kinds": Role(named=False, typed=False),
    "choices": _NOTE,
    "arguments": _NOTE,
    "notes": _NOTE,
    "config_hash": _NOTE,
}


def role_of(field: str) -> Role:
    """The role of a dotted field: its own, or that of the nearest section above it."""
    while field not in ROLES and "." in field:
        field = field.rpartition(".")[0]
    return ROLES.get(field, Role())


def hashed_fields(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section of config.yaml that change numbers."""
    return {k: v for k, v in values.items() if role_of(f"{section}.{k}").is_hashed}


def set_by(choice: str) -> list[str]:
    """The sections that the option of a group, or a saved model, may set besides its own."""
    return [name for name, role in ROLES.items() if choice in role.set_by]
