"""The end of a run before its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch

from nonfinite.step_callback import StepCallback, log
from src.stability.base import RemedyConfig, RunFacts, check_frac


@dataclass(kw_only=True)
class EarlyStopConfig(RemedyConfig):
    """Stops training at a share of the run; the write-up's option 2.

    The schedule stays that of the whole run.
    """

    ends_early: ClassVar[bool] = True

    stop_frac: float
    """The share after which it stops; above 0, at most 1."""

    def __post_init__(self) -> None:
        check_frac("stop_frac", self.stop_frac)
        if self.stop_frac == 0:
            raise ValueError("stop_frac=0.0: must be above 0")

    def start_step(self, parts: Mapping[str, Any]) -> int:
        """All its steps are the baseline's."""
        return self.last_step(parts)

    def last_step(self, parts: Mapping[str, Any]) -> int:
        """See RemedyConfig."""
        return max(1, round(self.stop_frac * parts["recipe"].max_steps))

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        """See RemedyConfig."""
        return "stop_frac is 1" if self.stop_frac == 1.0 else super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [EarlyStop(self, run)]


class EarlyStop(StepCallback):
    """Asks the trainer to stop after exactly the step."""

    def __init__(self, config: EarlyStopConfig, run: RunFacts) -> None:
        self.stop_step = max(1, run.step_at(config.stop_frac))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that has reached its step and is resumed goes no further."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step >= self.stop_step:
            trainer.should_stop = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Asks for the stop within the step, so that everybody logs it as the last."""
        if trainer.global_step + 1 >= self.stop_step:
            trainer.should_stop = True

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs the step after which it stopped."""
        if step >= self.stop_step:
            log(trainer, {"stability/early_stop_step": float(step)}, step=step)
