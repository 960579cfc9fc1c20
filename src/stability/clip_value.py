"""A bound on single entries of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy

if TYPE_CHECKING:
    import lightning.pytorch as pl

SCALES = ("absolute", "gradient_rms")


@dataclass(kw_only=True)
class ClipValueConfig(RemedyConfig):
    """Clips each entry of the gradient; the write-up notes that norm clipping does not do this.

    Norm clipping stays on and acts afterwards.
    """

    value: float
    """Largest absolute value of an entry, in units of `scale`; above 0."""
    scale: str
    """absolute: 1; gradient_rms: the root mean square of the entries of each tensor."""

    def __post_init__(self) -> None:
        check_positive("value", self.value)
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale}: must be one of {', '.join(SCALES)}")

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [ClipValue(self, run)]


class ClipValue(GradientRemedy):
    """Clips the entries, and logs the fraction clipped since the start of the run."""

    name = "clip_value"

    def __init__(self, config: ClipValueConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.num_bound, self.num_entries = torch.zeros((), dtype=torch.long), 0

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        for gradient in gradients:
            bound = torch.tensor(self.config.value, device=gradient.device)
            if self.config.scale == "gradient_rms":
                bound = bound * gradient.square().mean().sqrt()
            count = (gradient.abs() > bound).sum()
            self.num_bound = self.num_bound.to(count.device) + count
            self.num_entries += gradient.numel()
            gradient.clamp_(-bound, bound)
        self.figures["frac"] = self.num_bound / self.num_entries
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"num_bound": self.num_bound, "num_entries": self.num_entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_bound, self.num_entries = state_dict["num_bound"], state_dict["num_entries"]
