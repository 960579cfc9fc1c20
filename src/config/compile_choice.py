"""Whether the training step is compiled by torch.compile."""

import os
import shutil
import sys
from typing import Any

from src.common.errors import InputError
from src.config.schema import TrainerConfig
from src.model.architecture import Architecture, ModelParts
from src.training.recipe import RecipeConfig

CHOICES = ("true", "false", "auto")

WORTH_FLOPS = {"cpu": 1.5e13, "cuda": 3e16}
"""Floating-point operations of a run from which compiling saves more time than it costs, by device.
On one CPU thread compiling takes 40 to 65 s and saves a seventh of each step: worthwhile from 4e12
operations on for the model `stress`, and for `proxy` from 1.2e13 on with gqa and mlp, and from
1.6e13 on with mlha and moe. On an H100, for a model of 916M parameters in one piece, it took 150 s
and saved a third: worthwhile from 2,000 steps, or 1e16 operations."""

SMALL_VOCAB = 256
"""Vocabulary size to assume while the tokenizer's is not known yet."""


def is_compiled(
    asked: Any, architecture: Architecture, recipe: RecipeConfig, trainer: TrainerConfig
) -> bool:
    """Resolves the field `compile` to true or false.

    auto depends on the configuration alone, so that the same command always makes the same run. An
    external model is compiled only with compile=true.

    Raises:
        InputError: the value is not true, false or auto, or activation checkpointing forbids it.
    """
    if not isinstance(asked, bool) and asked != "auto":
        raise InputError(f"compile={asked}: must be one of {', '.join(CHOICES)}")
    if trainer.activation_checkpointing:
        field = "trainer.activation_checkpointing=true"
        if not isinstance(architecture, ModelParts):
            raise InputError(
                f"{field}: works with built-in models only; an external model must checkpoint its"
                " activations itself"
            )
        if asked is not False:
            raise InputError(
                f"{field}: needs compile=false; a compiled step decides itself which activations to"
                " keep"
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
    """Raises InputError if the run needs a C++ compiler and there is none."""
    # The compiler that torch.compile itself would call.
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if compiled and device == "cpu" and shutil.which(name) is None:
        raise InputError(
            f"compile: torch.compile needs the C++ compiler {name}, which is not installed; name"
            " another by the environment variable CXX, or type compile=false"
        )
