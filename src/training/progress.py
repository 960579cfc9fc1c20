"""The progress bar of a run."""

from collections.abc import Mapping

import lightning.pytorch as pl

from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.step_callback import StepCallback
from src.common import terminal


class ProgressBar(StepCallback):
    """Shows the loss, gradient norm, skipped steps and speed.

    Args:
        latest: the last value of each metric; another callback updates it.
        guard: the step guard, which counts skipped steps.
        max_steps: optimizer steps of the run.
    """

    def __init__(self, *, latest: Mapping[str, float], guard: StepGuard, max_steps: int) -> None:
        self.latest, self.guard, self.max_steps = latest, guard, max_steps
        self._bar: terminal.StepProgress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._bar = terminal.StepProgress(total=self.max_steps, done=trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self._bar is not None
        last = self.latest
        metrics = {
            "loss": terminal.number(last.get("train/loss")),
            "grad": terminal.number(last.get("grad/norm"), 3),
            "skipped": str(self.guard.counts["skipped_steps"]),
            "tok/s": terminal.number(last.get("speed/tokens_per_second")),
        }
        self._bar.update(step, metrics)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
