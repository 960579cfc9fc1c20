"""The base of callbacks that count optimizer steps instead of batches, and their logging."""

from typing import Any

import lightning.pytorch as pl


class StepCallback(pl.Callback):
    """Calls `on_step_end` once after each optimizer step, whatever the number of micro-batches.

    Steps are numbered from 1; skipped steps count too.
    """

    _last_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting from the trainer's step, which is above 0 in a resumed run.

        Raises:
            ValueError: the callback has been used in another run.
        """
        if self._last_step is not None and trainer.global_step < self._last_step:
            raise ValueError(
                f"this {type(self).__name__} has been used in a run up to step {self._last_step};"
                " create new callbacks for another run"
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
        """Calls `on_step_end` if this batch ended an optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Called after optimizer step number `step`."""


def is_log_step(trainer: pl.Trainer, step: int, *, every: int) -> bool:
    """True for the first step, multiples of `every`, and the last step, planned or requested."""
    return step == 1 or step % every == 0 or step == trainer.max_steps or trainer.should_stop


def log(trainer: pl.Trainer, metrics: dict[str, float], *, step: int) -> None:
    """Passes the metrics of one step to every logger, and to every callback that reads metrics.

    Such a callback has a method `read_metrics(trainer, metrics, step=...)`. With several processes,
    all of them must call this, and all receive the first process's metrics, so that they decide
    alike.
    """
    if trainer.world_size > 1:
        metrics = trainer.strategy.broadcast(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "read_metrics"):
            callback.read_metrics(trainer, metrics, step=step)
