"""Training that begins from the weights of a saved model: init=<run folder or checkpoint>.

The saved model brings its sizes, its attention, its feed-forward part and its tokenizer; the run
brings all else. How experts are used is the run's own, so that any router can be put on them. Where
experts are parts of a dense network, only one that picks the parts of one copy together keeps the
function: the write-up's, whose logits all begin at 0, does not. The loss before training tells.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.checkpoint.part_kinds import kinds_of
from src.checkpoint.rebuild import empty_model, misfit, parts_of, weights_of
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

UNSEEN = ("inner_dim", "sizes", "tie_embeddings")
"""Fields of the model that no weight's shape would betray: to type them would do nothing, or harm.
"""


@dataclass(frozen=True, kw_only=True)
class Init:
    """A saved model."""

    path: str
    """As it was typed."""

    @cached_property
    def file(self) -> Path:
        """The checkpoint. Raises InputError where there is none."""
        return checkpoint_of(Path(self.path), field="init")

    @cached_property
    def _saved(self) -> dict[str, Any]:
        return load_model(self.file, field="init")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """By the model's names; empty where it holds sizes alone."""
        return weights_of(self._saved)

    @cached_property
    def choices(self) -> dict[str, str]:
        """The options of attention, ffn and model."""
        choices: dict[str, str] = self._saved["config"]["choices"]
        return choices

    @cached_property
    def parts(self) -> ModelParts:
        """What it is built from; the size of its vocabulary is given."""
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
    """Overrides that choose its options, where neither the user nor a preset has chosen.

    Args:
        init: the saved model.
        typed: what was typed.
        choices: the option composed in each group.
        defaults: that of a composition in which nobody chooses.

    Raises:
        InputError: what it brings itself was typed.
    """
    for override in typed:
        group, _, field = override.key.partition(".")
        own = group == "tokenizer" or override.key == "model"
        if own or (group == "model" and field.partition(".")[0] in UNSEEN):
            raise InputError(
                f"{override.key}={override.text}: init={init.path} brings its own; leave it out"
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
    """Puts what the saved model brings in place of what was composed.

    Args:
        init: the saved model.
        parts: the sections of a configuration, by name.
        choices: the option chosen in each group.
        typed: what was typed, which stays.

    Raises:
        InputError: an option of another kind was typed.
    """
    own = kinds_of(init.parts.attention, init.parts.ffn)
    chosen = kinds_of(parts["attention"], parts["ffn"])
    for name, kind in own.items():
        if chosen[name] != kind:
            raise InputError(
                f"{name}={choices[name]}: init={init.path} has {name}={init.choices[name]};"
                " src.convert makes one out of the other"
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
    """Notes on weights that the saved model does not bring.

    Raises:
        InputError: its weights do not fit.
    """
    rows, wanted = init.parts.model.vocab_size, parts.model.vocab_size
    if wanted != rows:
        shown = "null" if wanted is None else wanted
        raise InputError(f"model.vocab_size={shown}: init={init.path} has {rows}")
    if not init.weights:
        return [f"init={init.path} holds sizes and no weights: they are drawn from the seed"]
    with torch.device("meta"):
        model, before = empty_model(parts), empty_model(init.parts)
    fresh = _more_norms(model, before)
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
        raise InputError(f"init={init.path}: its weights do not fit: {reason}")
    if fresh:
        return [f"init={init.path} has no {fresh[0]} ({len(fresh)} norms): they begin at 1"]
    return []


def _more_norms(model: Transformer, before: Transformer) -> list[str]:
    """Gains of norms that the one model has and the other has not."""
    known = set(before.state_dict())
    norms = [name for name, module in model.named_modules() if isinstance(module, RMSNorm)]
    return [name for norm in norms if (name := f"{norm}.weight") not in known]


def load_initial(model: nn.Module, init: Init) -> None:
    """Gives the model the saved weights; what `check_fit` noted stays as it was drawn."""
    model.load_state_dict(init.weights, strict=False)
