"""A lower learning rate throughout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.figure import factor_figure


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

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        """See RemedyConfig."""
        return "factor is 1" if self.factor == 1.0 else super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [factor_figure("lower_lr", self, run)]
