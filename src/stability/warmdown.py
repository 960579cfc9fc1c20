"""A learning rate that falls linearly in the last part of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_frac
from src.stability.effect_metric import lr_factor_metric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class WarmdownConfig(RemedyConfig):
    """Multiplies the learning rate by a factor that falls linearly; option 3 of the write-up."""

    start_frac: float
    """Fraction of the run before the factor starts to fall; from 0 to 1."""
    final_factor: float
    """The factor at the last step; from 0 to 1."""

    def __post_init__(self) -> None:
        check_frac("start_frac", self.start_frac)
        check_frac("final_factor", self.final_factor)

    def lr_factor(self, step: int, max_steps: int) -> float:
        """1 up to step start_frac * max_steps, then linear to final_factor at the last step."""
        start = round(self.start_frac * max_steps)
        progress = max(0, step + 1 - start) / max(1, max_steps - start)
        return 1.0 - (1.0 - self.final_factor) * min(1.0, progress)

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        return "final_factor is 1" if self.final_factor == 1.0 else super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [lr_factor_metric("warmdown", self, run)]
