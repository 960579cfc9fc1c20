"""Whether the training step goes through torch.compile."""

import os
import shutil
import sys
from typing import Any

from src.common.errors import InputError
from src.config.schema import TrainerConfig
from src.model.architecture import Architecture, ModelParts
from src.training.recipe import RecipeConfig

CHOICES = ("true", "false", "auto")

WORTH_FLOPS = {"cpu": 3e13, "cuda": 3e16}
"""From how many floating-point operations on a run earns the start-up back, by device: on one CPU
thread 20 to 40 seconds against a tenth of each step. On an H100, of one model of 916M parameters,
150 seconds against a third of each step: earned back after 2,000 steps, 1e16 operations."""

SMALL_VOCAB = 256
"""Tokens, where the tokenizer's number is not known yet."""


def is_compiled(
    asked: Any, architecture: Architecture, recipe: RecipeConfig, trainer: TrainerConfig
) -> bool:
    """What the field `compile` comes to.

    auto is decided by the configuration alone, so that the same command makes the same run; a model
    that is not ours is compiled only where that is asked for.

    Raises:
        InputError: it is none of true, false, auto, or the step cannot be what is asked.
    """
    if not isinstance(asked, bool) and asked != "auto":
        raise InputError(f"compile={asked}: must be one of {', '.join(CHOICES)}")
    if trainer.activation_checkpointing:
        field = "trainer.activation_checkpointing=true"
        if not isinstance(architecture, ModelParts):
            raise InputError(f"{field}: needs a model of ours; one of yours does that by itself")
        if asked is not False:
            raise InputError(
                f"{field}: goes with compile=false, a compiled step keeps what it needs"
            )
        return False
    if asked != "auto":
        return bool(asked)
    if not isinstance(architecture, ModelParts):
        return False
    size = architecture.measure(vocab_size=architecture.vocab_size or SMALL_VOCAB)
    tokens = recipe.max_steps * recipe.tokens_per_step
    return size.flops_per_token * tokens >= WORTH_FLOPS[trainer.device_type]


def check_compiler(*, compiled: bool, device: str) -> None:
    """Raises InputError where a run that is to be compiled finds nothing to compile with."""
    # What torch.compile itself would call.
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if compiled and device == "cpu" and shutil.which(name) is None:
        raise InputError(
            f"compile: this run is to be compiled and finds no C++ compiler {name};"
            " CXX=... names another, compile=false does without"
        )
