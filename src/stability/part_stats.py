"""Logs what parts of a model did in the last step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from src.stability.base import RunFacts
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


class PartStats(RemedyCallback):
    """Logs `stability/<remedy>_<statistic>` of the parts that a remedy put into the model.

    A part has the methods `stats`, which returns tensors by name, and `reset_stats`. The statistics
    are those of all micro-batches of the step; with several devices, of the first one's rows.

    Args:
        remedy: the name of the remedy.
        place: the last pieces of the parts' dotted names.
        run: facts about the run.
        reduce: amax or mean, over the parts.
    """

    def __init__(self, remedy: str, place: str, run: RunFacts, *, reduce: str = "amax") -> None:
        self.remedy, self.place, self.run, self.reduce = remedy, place, run, reduce
        self._parts: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Collected once: walking over all modules takes 1 % of the time of a small step.
        found = [m for path, m in pl_module.named_modules() if f".{path}".endswith(self.place)]
        self._parts = [part for part in found if hasattr(part, "reset_stats")]

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        # Read only where it is logged, because reading waits for the device.
        if self.is_log_step(trainer, step) and self._parts:
            stats = [part.stats() for part in self._parts]
            metrics = {
                f"stability/{self.remedy}_{name}": float(
                    getattr(torch.stack([each[name].float() for each in stats]), self.reduce)()
                )
                for name in stats[0]
            }
            self.log_at(trainer, step, metrics)
        for part in self._parts:
            part.reset_stats()
