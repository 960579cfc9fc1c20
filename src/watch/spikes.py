"""Spikes of loss and gradient norm."""

import math
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.training.guard import StepGuard
from src.training.steps import StepCallback, is_log_step, log

WINDOW = 128
SIGMAS = 6.0


class SpikeScore:
    """Share of values that exceed the rolling mean by 6 standard deviations (OLMo-core).

    The window holds the last 128 values that were not spikes; a non-finite value is a spike. The
    first values, until half a window is full, are not judged unless they are non-finite.
    """

    def __init__(self, *, sigmas: float = SIGMAS) -> None:
        self.sigmas = sigmas
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.num_values = 0
        self.num_spikes = 0

    def add(self, value: float) -> bool:
        """Takes one value; returns whether it is a spike."""
        self.num_values += 1
        spike = not math.isfinite(value)
        if not spike and len(self.window) >= WINDOW // 2:
            mean = math.fsum(self.window) / len(self.window)
            variance = math.fsum((v - mean) ** 2 for v in self.window) / (len(self.window) - 1)
            spike = value > mean + self.sigmas * math.sqrt(variance)
        if spike:
            self.num_spikes += 1
        else:
            self.window.append(value)
        return spike

    @property
    def score(self) -> float:
        """Spikes divided by values; 0 before the first."""
        return self.num_spikes / max(1, self.num_values)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "window": list(self.window),
            "num_values": self.num_values,
            "num_spikes": self.num_spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them up again."""
        self.window = deque(state["window"], maxlen=WINDOW)
        self.num_values, self.num_spikes = state["num_values"], state["num_spikes"]


class SpikeWatch(StepCallback):
    """Scores every step's loss and gradient norm, read in bulk on logged steps."""

    def __init__(self, guard: StepGuard, *, max_steps: int, every: int) -> None:
        self.guard, self.max_steps, self.every = guard, max_steps, every
        self.scores = {"loss": SpikeScore(), "grad": SpikeScore()}
        self.grad_norm_max, self.grad_norm_max_step = 0.0, 0
        self._pending: list[Tensor] = []
        self._step = 0

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Remembers the step's figures on their device; judges them on logged steps."""
        assert self.guard.loss is not None and self.guard.grad_norm is not None
        # Cross-entropy alone where the module keeps it apart from other losses.
        loss = getattr(pl_module, "step_losses", {}).get("loss", self.guard.loss)
        self._pending.append(torch.stack((loss, self.guard.grad_norm)))
        self._step = step
        if is_log_step(trainer, step, every=self.every):
            self._drain()
            scores = {f"spike/{name}_score": score.score for name, score in self.scores.items()}
            log(trainer, scores, step=step)

    def _drain(self) -> None:
        if not self._pending:
            return
        first = self._step - len(self._pending) + 1
        for step, (loss, norm) in enumerate(torch.stack(self._pending).tolist(), start=first):
            self.scores["loss"].add(loss)
            self.scores["grad"].add(norm)
            if math.isfinite(norm) and norm > self.grad_norm_max:
                self.grad_norm_max, self.grad_norm_max_step = norm, step
        self._pending.clear()

    def summary(self) -> dict[str, Any]:
        """The record's `spikes`."""
        self._drain()
        return {
            "loss_score": self.scores["loss"].score,
            "grad_score": self.scores["grad"].score,
            "grad_norm_max": self.grad_norm_max,
            "grad_norm_max_step": self.grad_norm_max_step or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Windows, counts and the greatest norm."""
        self._drain()
        return {
            "scores": {name: score.state_dict() for name, score in self.scores.items()},
            "grad_norm_max": self.grad_norm_max,
            "grad_norm_max_step": self.grad_norm_max_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        for name, state in state_dict["scores"].items():
            self.scores[name].load_state_dict(state)
        self.grad_norm_max = state_dict["grad_norm_max"]
        self.grad_norm_max_step = state_dict["grad_norm_max_step"]
