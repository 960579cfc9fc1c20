"""A model and its tokenizer from a run folder or a checkpoint, to write text with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.tokenizer import Tokenizer, restore_tokenizer
from src.errors import InputError
from src.model import Transformer
from src.run.restore import restore_model
from src.tracking.folder import RunFolder
from src.training import checkpoint

WEIGHTS = ("raw", "ema")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """What writes text."""

    model: Transformer
    """On the CPU, in evaluation mode, in float32."""
    tokenizer: Tokenizer
    step: int
    """Steps of training behind it."""


def load_writer(run: Path, *, weights: str) -> Writer:
    """Reads a checkpoint without running code from it.

    Args:
        run: a run folder, or a checkpoint.
        weights: raw or ema.

    Raises:
        InputError: there is no checkpoint, it is damaged, or holds no such weights.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights={weights}: must be one of {', '.join(WEIGHTS)}")
    saved = checkpoint.load(_checkpoint_of(run), field="run")
    try:
        model = restore_model(saved["config"], saved["state_dict"])
    except InputError as error:
        raise InputError(f"run={run}: {error}") from error
    if weights == "ema":
        _load_average(model, saved["callbacks"], run=run)
    return Writer(
        model=model.eval(),
        tokenizer=restore_tokenizer(saved["tokenizer"]),
        step=int(saved["global_step"]),
    )


def _checkpoint_of(run: Path) -> Path:
    if not run.exists():
        raise InputError(f"run={run}: no such run folder or checkpoint")
    if run.is_file():
        return run
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"run={run}: is no run folder, which is runs/<study>/<variant>/seed-<n> and holds"
            " config.yaml"
        )
    last = RunFolder(run).last_checkpoint()
    if last is None:
        raise InputError(f"run={run}: has no checkpoint yet")
    return last


def _load_average(model: Transformer, callbacks: Mapping[str, Any], *, run: Path) -> None:
    """Puts the averaged weights in place of the raw ones; they lie in the parameters' order."""
    states = [s for s in callbacks.values() if isinstance(s, Mapping) and s.get("shadow_params")]
    if not states:
        raise InputError(
            f"weights=ema: {run} has averaged no weights; stability=ema does (allowed: raw)"
        )
    averaged: list[Tensor] = states[0]["shadow_params"]
    parameters = list(model.parameters())
    assert [p.shape for p in parameters] == [a.shape for a in averaged]
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
