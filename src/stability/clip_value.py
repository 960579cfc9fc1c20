"""A bound on single entries of the gradient."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy

SCALES = ("absolute", "gradient_rms")


@dataclass(kw_only=True)
class ClipValueConfig(RemedyConfig):
    """Clips each entry of the gradient, which the write-up remarks that norm clipping does not.

    It acts before norm clipping, which stays on.
    """

    value: float
    """The bound on the absolute value of an entry, in units of `scale`; above 0."""
    scale: str
    """absolute: as it stands; gradient_rms: times the root mean square of each tensor's entries."""

    def __post_init__(self) -> None:
        check_positive("value", self.value)
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale}: must be one of {', '.join(SCALES)}")

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [ClipValue(self, run)]


class ClipValue(GradientRemedy):
    """Logs the share of entries that the bound has bound since the start."""

    name = "clip_value"

    def __init__(self, config: ClipValueConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.num_bound, self.num_entries = torch.zeros((), dtype=torch.long), 0

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        """See GradientRemedy."""
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
        """The counts."""
        return {"num_bound": self.num_bound, "num_entries": self.num_entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.num_bound, self.num_entries = state_dict["num_bound"], state_dict["num_entries"]
