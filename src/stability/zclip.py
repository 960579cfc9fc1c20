"""A bound on the gradient norm that follows its own statistics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy


@dataclass(kw_only=True)
class ZClipConfig(RemedyConfig):
    """ZClip (arXiv 2504.02507), in place of a fixed bound.

    A norm more than z_max standard deviations above its running mean is scaled down to
    mean + z_max^2 / z standard deviations. Steps that are not finite never enter the statistics,
    which one of them would poison for good in the published form.

    Ours has no fixed bound at all: it sets recipe.clip_norm to null. The authors' README uses ZClip
    with max_grad_norm=1.0, and then the smaller of the two bounds acts, in the warm-up as well. So
    this arm is the adaptive part alone: it clips less than theirs, and nothing in its warm-up.
    """

    alpha: float
    """Weight of the past in the running statistics; from 0 to below 1."""
    z_max: float
    """Standard deviations above the mean from which a norm is an outlier; above 0."""
    warmup_steps: int
    """Steps that only collect; at least 2."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: must be at least 0 and below 1")
        check_positive("z_max", self.z_max)
        if self.warmup_steps < 2:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be at least 2")

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.clip_norm": None}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [ZClip(self, run)]


class ZClip(GradientRemedy):
    """Logs how often it has clipped, and the mean of the norm."""

    name = "zclip"

    def __init__(self, config: ZClipConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.collected: list[float] = []
        self.mean = self.variance = 0.0
        self.num_clipped = 0

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        """See GradientRemedy."""
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
        """The statistics."""
        return {
            "collected": list(self.collected),
            "mean": self.mean,
            "variance": self.variance,
            "num_clipped": self.num_clipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.collected = list(state_dict["collected"])
        self.mean, self.variance = state_dict["mean"], state_dict["variance"]
        self.num_clipped = state_dict["num_clipped"]
