"""Adaptive clipping of the gradient norm, by its running statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class ZClipConfig(RemedyConfig):
    """ZClip (arXiv 2504.02507) instead of a fixed clipping norm.

    A norm whose z-score exceeds z_max is scaled down to mean + z_max^2 / z standard deviations.
    Non-finite norms never enter the statistics; in the published form, one of them would make the
    statistics non-finite for good.

    The remedy sets recipe.clip_norm to null, so that only the adaptive bound acts. The authors'
    README combines ZClip with max_grad_norm=1.0: there the smaller of both bounds acts, also during
    warm-up. This remedy therefore clips less, and not at all during warm-up.
    """

    alpha: float
    """Weight of the past in the running statistics; from 0 to below 1."""
    z_max: float
    """Largest z-score that is not clipped; above 0."""
    warmup_steps: int
    """Steps that collect statistics without clipping; at least 2."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: must be at least 0 and below 1")
        check_positive("z_max", self.z_max)
        if self.warmup_steps < 2:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be at least 2")

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.clip_norm": None}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [ZClip(self, run)]


class ZClip(GradientRemedy):
    """Clips the norm, and logs the number of clipped steps and the running mean of the norm."""

    name = "zclip"

    def __init__(self, config: ZClipConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.collected: list[float] = []
        self.mean = self.variance = 0.0
        self.num_clipped = 0

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        value = norm.item()
        if not math.isfinite(value):
            return False
        if len(self.collected) < self.config.warmup_steps:
            self.collected.append(value)
            self.mean = math.fsum(self.collected) / len(self.collected)
            squares = [(other - self.mean) ** 2 for other in self.collected]
            self.variance = math.fsum(squares) / len(squares)
            return False
        target = self._target(value)
        if target < value:
            self.num_clipped += 1
            for gradient in gradients:
                gradient *= target / value
        alpha = self.config.alpha
        self.mean = alpha * self.mean + (1 - alpha) * target
        self.variance = alpha * self.variance + (1 - alpha) * (target - self.mean) ** 2
        self.figures = {"clipped": float(self.num_clipped), "mean_norm": self.mean}
        return target < value

    def _target(self, norm: float) -> float:
        deviation = math.sqrt(self.variance)
        excess = norm - self.mean
        if excess <= self.config.z_max * deviation:
            return norm
        # z_max^2 / z standard deviations, with z = excess / deviation.
        return self.mean + self.config.z_max**2 * deviation**2 / excess

    def state_dict(self) -> dict[str, Any]:
        return {
            "collected": list(self.collected),
            "mean": self.mean,
            "variance": self.variance,
            "num_clipped": self.num_clipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collected = list(state_dict["collected"])
        self.mean, self.variance = state_dict["mean"], state_dict["variance"]
        self.num_clipped = state_dict["num_clipped"]
