"""Training that starts from the weights of a saved model: init=<run folder or checkpoint>.

The saved model determines sizes, attention, feed-forward part and tokenizer; the run's
configuration determines everything else. This includes how experts are routed, so that any router
can be trained on them. If the experts are slices of a dense network, only a router that picks all
slices of one copy together preserves the function. The router of `ffn=moe_writeup`, whose logits
all start at 0, does not; the loss before training shows the difference.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.checkpoint.rebuild import empty_model, kinds_of, misfit, parts_of, weights_of
from src.common.errors import InputError
from src.common.nested_values import replaced, value_at
from src.common.override_grammar import Override
from src.common.read_checkpoint import checkpoint_of, load_model
from src.data.tokenizer import CheckpointConfig
from src.model import Transformer
from src.model.architecture import ModelParts
from src.model.ffn import FeedForwardConfig
from src.model.norm import RMSNorm

SECTIONS = ("model", "attention", "ffn")

NOT_IN_SHAPES = ("inner_dim", "sizes", "tie_embeddings")
"""Fields of the model that do not show in any weight's shape, so a different value would have no
effect or do harm. They cannot be typed."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """The saved model that init= refers to."""

    path: str
    """The path as the user typed it."""

    @cached_property
    def file(self) -> Path:
        """The checkpoint file. Raises InputError if there is none."""
        return checkpoint_of(Path(self.path), field="init")

    @cached_property
    def _saved(self) -> dict[str, Any]:
        return load_model(self.file, field="init")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights by the model's names; empty if the checkpoint holds only sizes."""
        return weights_of(self._saved)

    @cached_property
    def choices(self) -> dict[str, str]:
        """The chosen options of attention, ffn and model."""
        choices: dict[str, str] = self._saved["config"]["choices"]
        return choices

    @cached_property
    def parts(self) -> ModelParts:
        """Configuration of the model's parts, with its vocabulary size filled in."""
        try:
            return parts_of(self._saved)
        except InputError as error:
            raise InputError(f"init={self.path}: {error}") from error


def options_of(
    init: Init,
    typed: Sequence[Override],
    *,
    choices: Mapping[str, str],
    defaults: Mapping[str, str],
) -> list[str]:
    """Overrides that choose the saved model's options, unless the user or a preset chose others.

    Args:
        init: the saved model.
        typed: the overrides that the user typed.
        choices: the composed option of each group.
        defaults: the default option of each group.

    Raises:
        InputError: the user typed something that the saved model determines.
    """
    for override in typed:
        group, _, field = override.key.partition(".")
        own = group == "tokenizer" or override.key == "model"
        if own or (group == "model" and field.partition(".")[0] in NOT_IN_SHAPES):
            raise InputError(
                f"{override.key}={override.text}: init={init.path} determines this; leave it out"
            )
    keys = {override.key for override in typed}
    return [
        f"{name}={init.choices[name]}"
        for name in ("attention", "ffn")
        if name not in keys and choices[name] == defaults[name]
    ]


def adopt(
    init: Init, parts: dict[str, Any], choices: dict[Any, Any], typed: Sequence[Override]
) -> None:
    """Replaces the composed parts by those of the saved model.

    Args:
        init: the saved model.
        parts: the sections of a configuration, by name.
        choices: the option chosen in each group.
        typed: the overrides that the user typed, which take precedence.

    Raises:
        InputError: the user typed an option of another kind.
    """
    own = kinds_of(init.parts.attention, init.parts.ffn)
    chosen = kinds_of(parts["attention"], parts["ffn"])
    for name, kind in own.items():
        if chosen[name] != kind:
            raise InputError(
                f"{name}={choices[name]}: init={init.path} has {name}={init.choices[name]};"
                " src.convert converts one into the other"
            )
    composed = {name: parts[name] for name in SECTIONS}
    parts["model"], parts["attention"] = init.parts.model, init.parts.attention
    ffn: FeedForwardConfig = init.parts.ffn
    usage = {name: getattr(composed["ffn"], name) for name in ffn.usage_fields}
    parts["ffn"] = dataclasses.replace(ffn, **usage)
    for override in typed:
        section, _, path = override.key.partition(".")
        if section in SECTIONS and path:
            value = value_at(composed, override.key)
            parts[section] = replaced(parts[section], path.split("."), value)
    parts["tokenizer"] = CheckpointConfig(path=str(init.file))
    choices["model"], choices["tokenizer"] = init.choices["model"], "checkpoint"


def check_fit(init: Init, parts: ModelParts, typed: Sequence[Override]) -> list[str]:
    """Notes on weights that the saved model lacks.

    Raises:
        InputError: the saved weights do not fit the configured model.
    """
    rows, wanted = init.parts.model.vocab_size, parts.model.vocab_size
    if wanted != rows:
        shown = "null" if wanted is None else wanted
        raise InputError(f"model.vocab_size={shown}: init={init.path} has {rows}")
    if not init.weights:
        return [f"init={init.path} holds sizes but no weights; they are drawn from the seed"]
    with torch.device("meta"):
        model, before = empty_model(parts), empty_model(init.parts)
    fresh = _added_norms(model, before)
    reason = misfit(model, {**init.weights, **{name: model.state_dict()[name] for name in fresh}})
    if reason is not None:
        own = {name: getattr(init.parts, name) for name in SECTIONS}
        for override in typed:
            if override.key.partition(".")[0] in SECTIONS and "." in override.key:
                there = value_at(own, override.key)
                if there != value_at({n: getattr(parts, n) for n in SECTIONS}, override.key):
                    raise InputError(
                        f"{override.key}={override.text}: init={init.path} has {there}"
                    )
        raise InputError(f"init={init.path}: its weights do not fit the model: {reason}")
    if fresh:
        return [f"init={init.path} has no {fresh[0]} ({len(fresh)} norms); they start at 1"]
    return []


def _added_norms(model: Transformer, before: Transformer) -> list[str]:
    """Names of norm gains that `model` has and `before` lacks."""
    known = set(before.state_dict())
    norms = [name for name, module in model.named_modules() if isinstance(module, RMSNorm)]
    return [name for norm in norms if (name := f"{norm}.weight") not in known]


def load_initial(model: nn.Module, init: Init) -> None:
    """Loads the saved weights; weights that the saved model lacks keep their initial values."""
    model.load_state_dict(init.weights, strict=False)
