"""`Nonfinite()`: guard and recorder in one callback, for any LightningModule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nonfinite.closing_line import line_of
from nonfinite.config import GuardConfig
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.recorder import IncidentRecorder


class Nonfinite(StepGuard):
    """Keeps non-finite gradients out of the weights, and explains the first of them.

    The single callback for a loop of your own; the laboratory composes `StepGuard`,
    `IncidentRecorder` and the instruments. It must be the first callback.

    Args:
        on_nonfinite: skip the step, stop the run, or raise.
        folder: the first non-finite step and the first spike are saved to <folder>/step-<n>/.
        say: shows one line.
    """

    def __init__(
        self,
        *,
        on_nonfinite: str = "skip",
        folder: str | Path = "incidents",
        say: Callable[[str], None] = print,
    ) -> None:
        config = GuardConfig(
            check=["loss", "gradients"],
            on_nonfinite=on_nonfinite,
            max_consecutive=None,
            on_alarm="none",
        )
        super().__init__(config, max_steps=1, log_every=50)
        self.recorder = IncidentRecorder(folder, say=say)

    @property
    def incident(self) -> dict[str, Any] | None:
        """The first non-finite step, as in incident.json; None if there was none."""
        return self.recorder.incident

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recorder.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without a limit, the tail of the run is unknown and counts no steps.
        self.max_steps = max(trainer.max_steps, 1)
        super().on_train_start(trainer, pl_module)
        self.recorder.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.recorder.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        super().on_step_end(trainer, pl_module, step)
        self.recorder.on_step_end(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        skipped = self.counts["skipped_steps"]
        fates = {"skipped": skipped, "applied": len(self.nonfinite_steps) - skipped}
        line = line_of(trainer.global_step, self.nonfinite_steps, fates)
        # Overflows that a GradScaler looks for are no incident.
        if line is not None and self.incident is not None and trainer.is_global_zero:
            self.recorder.say(line)

    def state_dict(self) -> dict[str, Any]:
        """The guard's state, and the recorder's below `recorder`."""
        return {**super().state_dict(), "recorder": self.recorder.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.recorder.load_state_dict(state_dict["recorder"])
