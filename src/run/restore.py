"""A model and its recipe from the plain configuration that a checkpoint or an incident carries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import omegaconf.errors
from omegaconf import OmegaConf
from torch import Tensor

from src.errors import InputError
from src.model import ModelConfig, Transformer
from src.model.attention import ATTENTIONS, AttentionConfig
from src.model.ffn import FEED_FORWARDS, FeedForwardConfig
from src.training.recipe import RecipeConfig

PREFIX = "model."
"""Of the model's names among those of the training task."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What a model is built from, and how it is trained."""

    model: ModelConfig
    attention: AttentionConfig
    ffn: FeedForwardConfig
    recipe: RecipeConfig


def empty_model(parts: ModelParts, weights: Mapping[str, Tensor]) -> Transformer:
    """A model on the CPU that is to take these weights; until then its own mean nothing.

    Args:
        parts: what it is built from.
        weights: by the names of the training task; they tell the size of the vocabulary.
    """
    return Transformer(
        model=parts.model,
        attention=parts.attention,
        ffn=parts.ffn,
        vocab_size=weights[f"{PREFIX}embedding.weight"].shape[0],
        max_seq_len=parts.recipe.seq_len,
    )


def restore_model(plain: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Transformer:
    """The model of a configuration with these weights, on the CPU.

    Args:
        plain: a configuration as `RunConfig.plain` gives it.
        weights: by the names of the training task.

    Raises:
        InputError: the weights are those of another model.
    """
    model = empty_model(restore_parts(plain, {}), weights)
    try:
        model.load_state_dict({n.removeprefix(PREFIX): value for n, value in weights.items()})
    except RuntimeError as error:
        raise InputError("its weights do not fit its configuration") from error
    return model


def restore_parts(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> ModelParts:
    """Makes the dataclasses again.

    Args:
        plain: a configuration as `RunConfig.plain` gives it.
        changes: other values, nested as the configuration is.

    Raises:
        InputError: a change names no field, or its value is not allowed.
    """
    classes: dict[str, type] = {
        "model": ModelConfig,
        "attention": ATTENTIONS[plain["kinds"]["attention"]],
        "ffn": FEED_FORWARDS[plain["kinds"]["ffn"]],
        "recipe": RecipeConfig,
    }
    for section in changes:
        if section not in classes:
            raise InputError(f"with.{section}: must be below one of {', '.join(classes)}")
    parts: dict[str, Any] = {}
    for section, kind in classes.items():
        try:
            node = OmegaConf.merge(
                OmegaConf.structured(kind), plain[section], changes.get(section) or {}
            )
            parts[section] = OmegaConf.to_object(node)
        except omegaconf.errors.OmegaConfBaseException as error:
            raise InputError(f"with.{section}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            raise InputError(f"with.{section}.{error}") from error
    return ModelParts(**parts)
