"""The progress bar of a run."""

from typing import Any

import lightning.pytorch as pl

from src import terminal
from src.training.guard import StepGuard
from src.training.metrics import TrainMetrics
from src.training.steps import StepCallback


class ProgressBar(StepCallback):
    """Shows loss, gradient norm, skipped steps and speed, with the figures of the last log line."""

    def __init__(self, *, metrics: TrainMetrics, guard: StepGuard, max_steps: int) -> None:
        self.metrics, self.guard, self.max_steps = metrics, guard, max_steps
        self._bar: terminal.StepProgress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar where the run stands."""
        super().on_train_start(trainer, pl_module)
        self._bar = terminal.StepProgress(total=self.max_steps, done=trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Moves it."""
        assert self._bar is not None
        last = self.metrics.last
        figures = {
            "loss": terminal.number(last.get("train/loss")),
            "grad": terminal.number(last.get("grad/norm"), 3),
            "skipped": str(self.guard.counts["skipped_steps"]),
            "tok/s": terminal.number(last.get("speed/tokens_per_second")),
        }
        self._bar.update(step, figures)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes it, whatever the end."""
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it only shows."""
        return {}
