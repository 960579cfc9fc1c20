"""A lower learning rate throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.effect_metric import lr_factor_metric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class LowerLRConfig(RemedyConfig):
    """Multiplies the learning rate by a constant; "retrain with lower learning rate" (write-up)."""

    factor: float
    """Factor on the learning rate of every step; above 0."""

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def lr_factor(self, step: int, max_steps: int) -> float:
        return self.factor

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        return "factor is 1" if self.factor == 1.0 else super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [lr_factor_metric("lower_lr", self, run)]
