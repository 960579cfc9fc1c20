"""A lower learning rate throughout."""

from dataclasses import dataclass

import lightning.pytorch as pl

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.warmdown import FactorLog


@dataclass(kw_only=True)
class LowerLRConfig(RemedyConfig):
    """Multiplies the rate by a constant; "retrain with lower learning rate" in the write-up."""

    factor: float
    """On the rate of every step; above 0."""

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def lr_factor(self, step: int, max_steps: int) -> float:
        """See RemedyConfig."""
        return self.factor

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [FactorLog("lower_lr", self, run)]
