"""SIGINT and SIGTERM end a run in order: at the end of the step, with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from nonfinite.step_callback import StepCallback


class Interrupt(StepCallback):
    """Takes both signals over while training runs; a second Ctrl-C ends it at once.

    Lightning's own handling ends a terminated process with exit code 0, which a scheduler takes
    for success.

    Attributes:
        signal: the number of the signal that came, or None.
        stopped: whether the run ends because of it, and not of itself.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces the handlers, Lightning's too; of several processes the first alone is asked."""
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Asks the trainer to stop, unless it does so anyway; all ranks after the same step."""
        asked = self.signal is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and not trainer.should_stop and step != trainer.max_steps:
            self.stopped = trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
