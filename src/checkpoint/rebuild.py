"""Rebuilds a model and its recipe from the plain configuration in a checkpoint or incident."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import omegaconf.errors
from omegaconf import OmegaConf
from torch import Tensor

from src.common.errors import InputError, nearest
from src.common.read_checkpoint import EXTERNAL
from src.model import ModelConfig, Transformer
from src.model.architecture import ModelParts
from src.model.attention import ATTENTIONS, AttentionConfig
from src.model.ffn import FEED_FORWARDS, FeedForwardConfig
from src.training.recipe import RecipeConfig

Part = TypeVar("Part")

PREFIX = "model."
"""Prefix of the model's names in the state of a training task."""


def empty_model(parts: ModelParts) -> Transformer:
    """A model with meaningless weights, to load others into.

    Args:
        parts: configuration of its parts, with the vocabulary size filled in.
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
    """A model with the given weights, on the CPU, in evaluation mode.

    Args:
        parts: configuration of its parts, with the vocabulary size filled in.
        weights: weights by the model's names.

    Raises:
        InputError: the weights do not fit the configuration.
    """
    model = empty_model(parts)
    reason = misfit(model, weights)
    if reason is not None:
        raise InputError(f"its weights do not fit its configuration: {reason}")
    model.load_state_dict(weights)
    return model.eval()


def weights_of(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the model's names; empty if it holds only sizes."""
    return {name.removeprefix(PREFIX): value for name, value in saved["state_dict"].items()}


def with_vocabulary_of(parts: ModelParts, weights: Mapping[str, Tensor]) -> ModelParts:
    """The parts with the vocabulary size of the weights filled in."""
    rows = weights["embedding.weight"].shape[0]
    return replace(parts, model=replace(parts.model, vocab_size=rows))


def misfit(model: Transformer, weights: Mapping[str, Tensor]) -> str | None:
    """A phrase about the first weight that does not fit the model; None if all fit."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            return f"{name} is missing"
        if weights[name].shape != value.shape:
            return f"{name} is {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
    more = [name for name in weights if name not in own]
    return f"{more[0]} is not part of the model" if more else None


def parts_of(saved: Mapping[str, Any]) -> ModelParts:
    """Configuration of the parts of a checkpoint's model, with the vocabulary size filled in.

    Raises:
        InputError: the checkpoint's configuration is not one of this project.
    """
    parts = restore_parts(saved["config"], {})
    return with_vocabulary_of(parts, weights_of(saved)) if saved["state_dict"] else parts


def restore_parts(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> ModelParts:
    """Rebuilds the dataclasses of a model's parts.

    Args:
        plain: a configuration as `RunConfig.plain` returns it.
        changes: values to change, nested like the configuration; other sections are ignored.

    Raises:
        InputError: a change does not name a field, its value is not allowed, or the model is
            external.
    """
    if plain["kinds"]["attention"] == EXTERNAL:
        raise InputError(
            f"its model is external ({plain['model']['target']}), and code that a file names is"
            " never run; type target= to src.diagnose"
        )
    return ModelParts(
        model=_restore("model", ModelConfig, plain, changes),
        attention=_restore("attention", ATTENTIONS[plain["kinds"]["attention"]], plain, changes),
        ffn=_restore("ffn", FEED_FORWARDS[plain["kinds"]["ffn"]], plain, changes),
        seq_len=plain["recipe"]["seq_len"],
    )


def restore_recipe(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> RecipeConfig:
    """Rebuilds the dataclass of the recipe; arguments and errors as for `restore_parts`."""
    return _restore("recipe", RecipeConfig, plain, changes)


def _restore(
    section: str, kind: type[Part], plain: Mapping[str, Any], changes: Mapping[str, Any]
) -> Part:
    try:
        node = OmegaConf.merge(
            OmegaConf.structured(kind), plain[section], changes.get(section) or {}
        )
        made = OmegaConf.to_object(node)
    except (omegaconf.errors.ConfigKeyError, omegaconf.errors.ConfigAttributeError) as error:
        raise InputError(_unknown(section, kind, plain, str(error.full_key))) from error
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(f"{section}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise InputError(f"{section}.{error}") from error
    assert isinstance(made, kind)
    return made


def _unknown(section: str, kind: type[Any], plain: Mapping[str, Any], key: str) -> str:
    """The line for a field that a section lacks: the nearest, and those beside it."""
    *above, last = key.split(".")
    node: Any = OmegaConf.merge(OmegaConf.structured(kind), plain[section])
    for part in above:
        node = node[part]
    known = [str(name) for name in node]
    return (
        f"{'.'.join([section, key])}: unknown field; {nearest(last, known)}"
        f"allowed: {', '.join(known)}"
    )


@dataclass(kw_only=True)
class ExternalPart:
    """Stands for the attention or feed-forward part of an external model, which has no options."""

    def resolved(self, *, max_steps: int) -> "ExternalPart":
        """Itself, because nothing in it depends on the length of the run."""
        return self


def kinds_of(
    attention: AttentionConfig | ExternalPart, ffn: FeedForwardConfig | ExternalPart
) -> dict[str, str]:
    """Registered names of the attention and ffn classes; several options may share a class."""
    return {"attention": _kind(attention, ATTENTIONS), "ffn": _kind(ffn, FEED_FORWARDS)}


def _kind(config: object, registry: Mapping[str, type]) -> str:
    known = {**registry, EXTERNAL: ExternalPart}
    return next(name for name, kind in known.items() if kind is type(config))
