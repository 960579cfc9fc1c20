"""Loads a trained model with its tokenizer from a run folder or a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checkpoint.rebuild import parts_of, restore_model, weights_of
from src.common.errors import InputError
from src.common.read_checkpoint import checkpoint_of, load_model
from src.data.tokenizer import Tokenizer, restore_tokenizer
from src.model import Transformer
from src.model.architecture import ModelParts

WEIGHTS = ("raw", "ema")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model, its tokenizer and its configuration."""

    model: Transformer
    """On the CPU, in evaluation mode, in float32."""
    parts: ModelParts
    """Configuration of its parts, with the vocabulary size filled in."""
    tokenizer: Tokenizer
    choices: Mapping[str, str]
    """The chosen options of attention, ffn and model."""
    step: int
    """Optimizer steps that it was trained for."""


def load_trained(place: Path, *, weights: str, field: str) -> TrainedModel:
    """Reads a checkpoint without running code from it.

    Args:
        place: a run folder, a converted model's folder, or a checkpoint.
        weights: raw or ema.
        field: the field that holds the place, named in errors.

    Raises:
        InputError: there is no checkpoint, it is damaged, or it lacks these weights.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights={weights}: must be one of {', '.join(WEIGHTS)}")
    saved = load_model(checkpoint_of(place, field=field), field=field)
    if not saved["state_dict"]:
        raise InputError(
            f"{field}={place}: holds a model's sizes but no weights; src.train init={place}"
            " trains it from scratch"
        )
    try:
        parts = parts_of(saved)
        model = restore_model(parts, weights_of(saved))
    except InputError as error:
        raise InputError(f"{field}={place}: {error}") from error
    if weights == "ema":
        _load_average(model, saved.get("callbacks", {}), place=place)
    return TrainedModel(
        model=model,
        parts=parts,
        tokenizer=restore_tokenizer(saved["tokenizer"]),
        choices={name: saved["config"]["choices"][name] for name in ("attention", "ffn", "model")},
        step=int(saved.get("global_step", 0)),
    )


def _load_average(model: Transformer, callbacks: Mapping[str, Any], *, place: Path) -> None:
    """Replaces the raw weights by the averaged ones, which are saved in the parameters' order."""
    states = [s for s in callbacks.values() if isinstance(s, Mapping) and s.get("shadow_params")]
    if not states:
        raise InputError(
            f"weights=ema: {place} has no averaged weights, as runs with stability=ema have; type"
            " weights=raw"
        )
    averaged: list[Tensor] = states[0]["shadow_params"]
    parameters = list(model.parameters())
    assert [p.shape for p in parameters] == [a.shape for a in averaged]
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
