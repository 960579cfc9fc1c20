"""A model and its recipe from the plain configuration that a checkpoint or an incident carries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import omegaconf.errors
from omegaconf import OmegaConf
from torch import Tensor

from src.common.errors import InputError
from src.common.read_checkpoint import EXTERNAL
from src.model import ModelConfig, Transformer
from src.model.architecture import ModelParts
from src.model.attention import ATTENTIONS
from src.model.ffn import FEED_FORWARDS
from src.training.recipe import RecipeConfig

Part = TypeVar("Part")

PREFIX = "model."
"""Of the model's names among those of the training task."""


def empty_model(parts: ModelParts) -> Transformer:
    """A model that is to take weights; until then its own mean nothing.

    Args:
        parts: what it is built from; the size of its vocabulary is given.
    """
    assert parts.model.vocab_size is not None
    return Transformer(
        model=parts.model,
        attention=parts.attention,
        ffn=parts.ffn,
        vocab_size=parts.model.vocab_size,
        max_seq_len=parts.seq_len,
    )


def restore_model(parts: ModelParts, weights: Mapping[str, Tensor]) -> Transformer:
    """A model with these weights, on the CPU, in evaluation mode.

    Args:
        parts: what it is built from; the size of its vocabulary is given.
        weights: by the model's names.

    Raises:
        InputError: the weights are those of another model.
    """
    model = empty_model(parts)
    reason = misfit(model, weights)
    if reason is not None:
        raise InputError(f"its weights do not fit its configuration: {reason}")
    model.load_state_dict(weights)
    return model.eval()


def weights_of(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the model's names; none where it holds sizes alone."""
    return {name.removeprefix(PREFIX): value for name, value in saved["state_dict"].items()}


def with_vocabulary_of(parts: ModelParts, weights: Mapping[str, Tensor]) -> ModelParts:
    """The same with the size of the vocabulary that weights, by the model's names, have."""
    rows = weights["embedding.weight"].shape[0]
    return replace(parts, model=replace(parts.model, vocab_size=rows))


def misfit(model: Transformer, weights: Mapping[str, Tensor]) -> str | None:
    """The first weight that does not fit the model, in words; None where all do."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            return f"{name} is missing"
        if weights[name].shape != value.shape:
            return f"{name} is {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
    more = [name for name in weights if name not in own]
    return f"{more[0]} is one too many" if more else None


def parts_of(saved: Mapping[str, Any]) -> ModelParts:
    """What the model of a checkpoint is built from; the size of its vocabulary is given.

    Raises:
        InputError: its configuration is not one of ours.
    """
    parts = restore_parts(saved["config"], {})
    return with_vocabulary_of(parts, weights_of(saved)) if saved["state_dict"] else parts


def restore_parts(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> ModelParts:
    """Makes the dataclasses again.

    Args:
        plain: a configuration as `RunConfig.plain` gives it.
        changes: other values, nested as the configuration is; those of other sections are left.

    Raises:
        InputError: a change names no field, or its value is not allowed; the model is not ours.
    """
    if plain["kinds"]["attention"] == EXTERNAL:
        raise InputError(
            f"its model is external ({plain['model']['target']}), and code that a file names is"
            " not run; src.diagnose takes the target from you"
        )
    return ModelParts(
        model=_restore("model", ModelConfig, plain, changes),
        attention=_restore("attention", ATTENTIONS[plain["kinds"]["attention"]], plain, changes),
        ffn=_restore("ffn", FEED_FORWARDS[plain["kinds"]["ffn"]], plain, changes),
        seq_len=plain["recipe"]["seq_len"],
    )


def restore_recipe(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> RecipeConfig:
    """The same for how it is trained."""
    return _restore("recipe", RecipeConfig, plain, changes)


def _restore(
    section: str, kind: type[Part], plain: Mapping[str, Any], changes: Mapping[str, Any]
) -> Part:
    try:
        node = OmegaConf.merge(
            OmegaConf.structured(kind), plain[section], changes.get(section) or {}
        )
        made = OmegaConf.to_object(node)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(f"{section}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise InputError(f"{section}.{error}") from error
    assert isinstance(made, kind)
    return made
