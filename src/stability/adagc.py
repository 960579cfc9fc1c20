"""Adaptive clipping of each tensor's gradient norm, by its own history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy
from src.stability.remedy_callback import refuse_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class AdaGCConfig(RemedyConfig):
    """AdaGC (arXiv 2502.11034, algorithm 1) instead of a fixed clipping norm.

    In steps t < warmup_steps the norm of the whole gradient is bounded, and each tensor i keeps the
    smallest clipped norm that it has had:

        h = min(1, max_norm / |g|),  g_i <- h g_i,  gamma_i = min(gamma_i, |g_i|)

    From then on each tensor is bounded by its own average of clipped norms:

        h_i = min(1, ratio gamma_i / |g_i|),  g_i <- h_i g_i,
        gamma_i = beta gamma_i + (1 - beta) |g_i|

    The paper calls max_norm lambda_abs and ratio lambda_rel. As in the paper, these bounds replace
    the fixed one: the remedy sets recipe.clip_norm to null.

    Departures: a norm of 0, such as that of an expert without tokens, does not enter gamma. By the
    paper's rule gamma would be 0 then, and the tensor would never move again. If the first gradient
    of a tensor comes after the warm-up, it is not clipped and starts the average. A non-finite step
    changes nothing.

    One small norm during warm-up, such as that of an expert with few tokens, keeps a tensor's bound
    low for long: gamma grows by at most (1 - beta) (ratio - 1) of itself a step, 0.1 % with the
    default values. AdamW makes up for a factor that stays the same, but not for one that changes.
    """

    max_norm: float
    """Bound on the norm of the whole gradient during warm-up; above 0."""
    ratio: float
    """Bound on a tensor's norm after warm-up, relative to its average; above 0."""
    beta: float
    """Weight of the past in the average; from 0 to below 1."""
    warmup_steps: int
    """Step from which tensors are bounded by their averages; at least 2."""

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)
        check_positive("ratio", self.ratio)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: must be at least 0 and below 1")
        if self.warmup_steps < 2:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be at least 2")

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.clip_norm": None}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [AdaGC(self, run)]


class AdaGC(GradientRemedy):
    """Clips the tensors; with DDP all processes have the same norms, so that all clip alike.

    Logs the number of tensors clipped after warm-up, that of steps clipped during it, and the
    smallest factor of the last step that was applied.

    Attributes:
        gamma: the average of each of the optimizer's parameters, infinite before its first norm.
    """

    name = "adagc"

    def __init__(self, config: AdaGCConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.gamma = torch.empty(0)
        self.num_clipped = torch.zeros((), dtype=torch.long)
        self.num_warmup_clipped = 0
        self.factor_min = torch.ones(())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        refuse_sharded(trainer, self.name)
        num_params = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        if not len(self.gamma):
            self.gamma = torch.full((num_params,), math.inf)

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        total = norm.item()
        if not math.isfinite(total):
            return False
        norms = torch.stack(torch._foreach_norm(gradients)).float()
        places = torch.tensor([place for place, _ in self.numbered], device=norms.device)
        self.gamma = self.gamma.to(norms.device)
        gamma = self.gamma[places]
        if step < self.config.warmup_steps:
            share = min(1.0, self.config.max_norm / total) if total else 1.0
            self.num_warmup_clipped += share < 1
            factors = torch.full_like(norms, share)
            new = torch.minimum(gamma, norms * factors)
        else:
            # A bound of infinity divided by a norm of 0 is not below 1 either.
            factors = (self.config.ratio * gamma / norms).nan_to_num(nan=1.0).clamp(max=1.0)
            clipped = norms * factors
            new = self.config.beta * gamma + (1 - self.config.beta) * clipped
            new = torch.where(gamma.isinf(), clipped, new)
            count = (factors < 1).sum()
            self.num_clipped = self.num_clipped.to(count.device) + count
        self.gamma[places] = torch.where(norms > 0, new, gamma)
        for gradient, factor in zip(gradients, factors.unbind(), strict=True):
            gradient *= factor.to(gradient.dtype)
        self.factor_min = factors.min()
        return True

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        # From the state, so that a run that is resumed before a skipped step logs the same.
        self.figures = {
            "clipped": self.num_clipped,
            "warmup_clipped": float(self.num_warmup_clipped),
            "factor_min": self.factor_min,
        }
        super().on_step_end(trainer, pl_module, step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma,
            "num_clipped": self.num_clipped,
            "num_warmup_clipped": self.num_warmup_clipped,
            "factor_min": self.factor_min,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gamma = state_dict["gamma"]
        self.num_clipped = state_dict["num_clipped"]
        self.num_warmup_clipped = state_dict["num_warmup_clipped"]
        self.factor_min = state_dict["factor_min"]
