"""The metrics that every run logs: losses, learning rate, clipping and speed."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from nonfinite.lightning.step_callback import StepCallback, is_log_step, log
from src.training.task import LanguageModelTask


class TrainMetrics(StepCallback):
    """Logs means since the last logged line: of losses over finite steps, of clipping over all.

    Sums stay on the device, so that only logged steps synchronise with it.

    Attributes:
        train_seconds: time spent in steps, including before the run was resumed.
        first_step_seconds: the part spent in the first step after each start, which compiles.
    """

    def __init__(self, *, tokens_per_step: int, max_steps: int, log_every: int) -> None:
        self.tokens_per_step, self.max_steps, self.log_every = tokens_per_step, max_steps, log_every
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._clipped = torch.zeros(())
        self._num_steps = 0
        self._started = time.perf_counter()
        self._seconds, self._timed_steps = 0.0, 0
        self.train_seconds = self.first_step_seconds = 0.0
        self._is_first = True
        self._began, self._wall_before = time.perf_counter(), 0.0

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began; for a resumed run, plus those before its last checkpoint."""
        return self._wall_before + time.perf_counter() - self._began

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock, which does not run during validation and checkpointing."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops the clock."""
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self.train_seconds += seconds
        if self._is_first:
            self.first_step_seconds += seconds
            self._is_first = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Adds the step to the means; logs them on logged steps."""
        assert isinstance(pl_module, LanguageModelTask)
        for name, loss in pl_module.step_losses.items():
            finite = loss.isfinite()
            total, count = self._sums.get(name, [torch.zeros_like(loss), torch.zeros_like(loss)])
            # torch.where rather than a product, because 0 * NaN is NaN.
            self._sums[name] = [total + torch.where(finite, loss, 0.0), count + finite]
        self._clipped = self._clipped.to(pl_module.clip_bound.device) + pl_module.clip_bound
        self._num_steps += 1
        self._timed_steps += 1
        if is_log_step(trainer, step, every=self.log_every):
            self._log(trainer, pl_module, step)

    def _log(self, trainer: pl.Trainer, pl_module: LanguageModelTask, step: int) -> None:
        seconds = self._seconds / self._timed_steps
        metrics = {
            # lr_factor counts from 0, so this step's rate is that of step - 1.
            "lr": pl_module.recipe.learning_rate * pl_module.lr_factor(step - 1),
            "speed/step_seconds": seconds,
            "speed/tokens_per_second": self.tokens_per_step / seconds,
        }
        if pl_module.recipe.clip_norm is not None:
            metrics["grad/clip_frac"] = self._clipped.item() / self._num_steps
        for name, (total, count) in self._sums.items():
            if count.item():
                metrics[f"train/{name}"] = (total / count).item()
        log(trainer, metrics, step=step)
        self._sums, self._clipped, self._num_steps = {}, torch.zeros(()), 0
        self._seconds, self._timed_steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last logged line, and the time spent training."""
        return {
            "sums": self._sums,
            "clipped": self._clipped,
            "num_steps": self._num_steps,
            "train_seconds": self.train_seconds,
            "first_step_seconds": self.first_step_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the sums up again."""
        self._sums = state_dict["sums"]
        self._clipped, self._num_steps = state_dict["clipped"], state_dict["num_steps"]
        self.train_seconds = state_dict["train_seconds"]
        # Checkpoints of earlier versions lack this key.
        self.first_step_seconds = state_dict.get("first_step_seconds", 0.0)
        self._wall_before = state_dict["wall_seconds"]
