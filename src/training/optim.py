"""The optimizer: AdamW over two groups, decayed and not."""

from collections.abc import Iterable

import torch
from torch import nn

from src.training.recipe import RecipeConfig


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, weight_decay: float, decay_params: str
) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one group; tied ones come once."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [p for p in trainable if decay_params == "all" or p.dim() >= 2]
    spared = [p for p in trainable if decay_params != "all" and p.dim() < 2]
    groups = (decayed, weight_decay), (spared, 0.0)
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(parameters: Iterable[nn.Parameter], recipe: RecipeConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""
    groups = parameter_groups(
        parameters, weight_decay=recipe.weight_decay, decay_params=recipe.decay_params
    )
    betas = recipe.betas[0], recipe.betas[1]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=recipe.fused
    )
