"""Writes checkpoints atomically: the last state, the best three, and states kept for branches."""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.step_callback import StepCallback
from src.common import storage
from src.training.validation import Validation

KEEP_BEST = 3


class Checkpoints(StepCallback):
    """Saves after each validation, every `every` steps, and when the run stops.

    Must be the last callback, so that it saves the other callbacks' final state. Ranks steps by
    (val/nonfinite_frac, val/loss).

    Args:
        last: file of the last state; the best states are saved in the same folder.
        validation: provides the metrics that rank a step.
        every: steps between saves of the last state, besides those after validation; None: none.
        keep: files for states that other runs will branch from, by step; they are never deleted.
            If the guard ends the run, its last state stands for those of later steps: a branch that
            would act only then ends with it.
        keys: returns what the state of a step depends on; it is saved next to the state as .key.
        flush: called before a save, so that the metrics on disk are as recent as the checkpoint;
            returns the number of their lines, which the checkpoint records.
    """

    def __init__(
        self,
        last: Path,
        *,
        validation: Validation,
        every: int | None,
        keep: Mapping[int, Path],
        keys: Callable[[int], str],
        flush: Callable[[], int],
    ) -> None:
        self.last, self.folder, self.validation = last, last.parent, validation
        self.every, self.keep, self.keys, self.flush = every, dict(keep), keys, flush
        self.best: list[tuple[float, float, int]] = []

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Saves if a save is due."""
        validated = self.validation.last_step == step
        due = self.every is not None and step % self.every == 0
        kept = self._kept_at(trainer, step)
        if not (validated or due or kept or trainer.should_stop):
            return
        stale = self._rank(step) if validated else []
        save(trainer, self.last)
        if not trainer.is_global_zero:
            return
        if validated and step in {entry[2] for entry in self.best}:
            _replace_by_copy(self.last, self.folder / _name(step))
        for planned, state in kept.items():
            key = state.with_suffix(".key")
            # A state without a key is never used; an old key next to a new state would be wrong.
            key.unlink(missing_ok=True)
            _replace_by_copy(self.last, state)
            key.write_text(self.keys(planned), encoding="utf-8")
        for old in stale:
            (self.folder / _name(old)).unlink(missing_ok=True)

    def _kept_at(self, trainer: pl.Trainer, step: int) -> dict[int, Path]:
        """The files to be kept after a step, by the step that they are for."""
        guard = StepGuard.of(trainer)
        is_over = guard is not None and guard.stopped
        return {
            planned: state
            for planned, state in self.keep.items()
            if planned == step or (is_over and planned > step)
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Flushes the metrics to disk, and records their number of lines."""
        checkpoint["metric_lines"] = self.flush()

    def _rank(self, step: int) -> list[int]:
        """Adds a validated step to the best ones; returns the steps that dropped out."""
        metrics = self.validation.last
        entry = metrics["val/nonfinite_frac"], metrics.get("val/loss", math.inf), step
        ranked = sorted([*self.best, entry])
        self.best = ranked[:KEEP_BEST]
        return [old for _, _, old in ranked[KEEP_BEST:] if old != step]

    def state_dict(self) -> dict[str, Any]:
        """The best steps and their ranks."""
        return {"best": [list(entry) for entry in self.best]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = [(entry[0], entry[1], entry[2]) for entry in state_dict["best"]]


def _name(step: int) -> str:
    return f"step-{step}.ckpt"


def _replace_by_copy(source: Path, target: Path) -> None:
    """Replaces `target` by a hard link to `source`, or by a copy if links are not supported."""
    draft = target.with_suffix(".part")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    os.replace(draft, target)


class StraightToFile(TorchCheckpointIO):
    """Streams a checkpoint to its file; Lightning's own class holds it in memory twice."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Not atomic by itself; `save` writes to a draft file and renames it."""
        with storage.tensors_to(Path(path)):
            torch.save(checkpoint, path)


def save(trainer: pl.Trainer, path: Path) -> None:
    """Saves to a draft file and renames it, so that a kill leaves the old file or the new one."""
    draft = path.with_suffix(".part")
    trainer.save_checkpoint(draft)
    if trainer.is_global_zero:
        os.replace(draft, path)
