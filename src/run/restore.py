"""A model and its recipe from the plain configuration that a checkpoint or an incident carries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import omegaconf.errors
from omegaconf import OmegaConf

from src.errors import InputError
from src.model import ModelConfig
from src.model.attention import ATTENTIONS, AttentionConfig
from src.model.ffn import FEED_FORWARDS, FeedForwardConfig
from src.training.recipe import RecipeConfig


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What a model is built from, and how it is trained."""

    model: ModelConfig
    attention: AttentionConfig
    ffn: FeedForwardConfig
    recipe: RecipeConfig


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
