"""Callbacks that count optimizer steps instead of batches."""

from typing import Any

import lightning.pytorch as pl


class StepCallback(pl.Callback):
    """Calls `on_step_end` once after each optimizer step, however many batches made it.

    Steps are numbered from 1; a step that the guard skipped has its number too.
    """

    _last_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count, also of a run that resumes.

        Raises:
            ValueError: it has followed another run.
        """
        if self._last_step is not None and trainer.global_step < self._last_step:
            raise ValueError(
                f"this {type(self).__name__} has followed a run up to step {self._last_step};"
                " another run needs callbacks of its own"
            )
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tells batches that ended a step from those that did not."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Called after optimizer step number `step`."""


def is_log_step(trainer: pl.Trainer, step: int, *, every: int) -> bool:
    """The first step, every multiple of `every`, and the last, planned or asked for."""
    return step == 1 or step % every == 0 or step == trainer.max_steps or trainer.should_stop


def log(trainer: pl.Trainer, metrics: dict[str, float], *, step: int) -> None:
    """Hands figures of one step to every logger, and to every callback that reads figures.

    Such a callback has a method `read_metrics(trainer, metrics, step=...)`. Of several processes
    all get the figures of the first, so that they decide alike; to be called by all of them.
    """
    if trainer.world_size > 1:
        metrics = trainer.strategy.broadcast(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "read_metrics"):
            callback.read_metrics(trainer, metrics, step=step)
