"""Stopping a run early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from src.stability.base import RemedyConfig, RunFacts, check_frac
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class EarlyStopConfig(RemedyConfig):
    """Stops training after a fraction of the run; option 2 of the write-up.

    The learning rate still follows the schedule of the whole run.
    """

    ends_early: ClassVar[bool] = True

    stop_frac: float
    """Fraction of the run after which training stops; above 0, at most 1."""

    def __post_init__(self) -> None:
        check_frac("stop_frac", self.stop_frac)
        if self.stop_frac == 0:
            raise ValueError("stop_frac=0.0: must be above 0")

    def start_step(self, parts: Mapping[str, Any]) -> int:
        """All steps are the baseline's: the remedy only leaves out the rest."""
        return self.last_step(parts)

    def last_step(self, parts: Mapping[str, Any]) -> int:
        return max(1, round(self.stop_frac * parts["recipe"].max_steps))

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        return "stop_frac is 1" if self.stop_frac == 1.0 else super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [EarlyStop(self, run)]


class EarlyStop(RemedyCallback):
    """Makes the trainer stop after exactly `stop_step` steps."""

    def __init__(self, config: EarlyStopConfig, run: RunFacts) -> None:
        self.run = run
        self.stop_step = max(1, run.step_at(config.stop_frac))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run may have reached its last step already.
        if trainer.global_step >= self.stop_step:
            trainer.should_stop = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Requested before the step ends, so that all callbacks treat this step as the last one.
        if trainer.global_step + 1 >= self.stop_step:
            trainer.should_stop = True

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if step >= self.stop_step:
            self.log_at(trainer, step, {"stability/early_stop_step": float(step)})
