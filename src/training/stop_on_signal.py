"""SIGINT and SIGTERM stop a run cleanly, after the current step and with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from nonfinite.lightning.step_callback import StepCallback


class Interrupt(StepCallback):
    """Handles both signals during training; a second Ctrl-C ends the run at once.

    Lightning's own handler ends a terminated process with exit code 0, which a scheduler would take
    for success.

    Attributes:
        signal: number of the received signal, or None.
        stopped: whether the run ended because of a signal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces the handlers, including Lightning's; of several processes, in the first only."""
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
        """Stops the trainer after the same step on all ranks, unless it ends here anyway."""
        asked = self.signal is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and not trainer.should_stop and step != trainer.max_steps:
            self.stopped = trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
