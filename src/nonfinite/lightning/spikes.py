"""Spikes of loss and gradient norm."""

import math
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from nonfinite.config import check_interval
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.step_callback import StepCallback, is_log_step, log

DEFINITIONS = {"": (6.0, 128), "_1000": (7.0, 1000)}
"""Standard deviations and window by the metric's suffix; those of OLMo-core and of OLMo 2."""

LARGE_RATIO, LARGE_NORM = 5.0, 100.0
"""Bounds for a large gradient norm: relative to the running median, and absolute."""

LEAST = 64
"""Values that a window must hold before it is used."""


class SpikeScore:
    """Share of values that exceed the rolling mean by a number of standard deviations.

    The window holds the latest values that were not spikes. A non-finite value is always a spike;
    finite values are judged once the window holds 64. Lightning's SpikeDetection (2.6) cannot be
    used for this, because it ends the run at the first loss that is not finite or exceeds three
    times a running mean.
    """

    def __init__(self, *, sigmas: float = 6.0, window: int = 128) -> None:
        self.sigmas = sigmas
        self.window: deque[float] = deque(maxlen=window)
        self.num_values = 0
        self.num_spikes = 0

    def add(self, value: float) -> bool:
        """Adds one value; returns whether it is a spike."""
        self.num_values += 1
        spike = not math.isfinite(value)
        if not spike and len(self.window) >= LEAST:
            spike = value > self._mean() + self.sigmas * self._deviation()
        if spike:
            self.num_spikes += 1
        else:
            self.window.append(value)
        return spike

    def _mean(self) -> float:
        return math.fsum(self.window) / len(self.window)

    def _deviation(self) -> float:
        mean = self._mean()
        squares = math.fsum((value - mean) ** 2 for value in self.window)
        return math.sqrt(squares / (len(self.window) - 1))

    @property
    def score(self) -> float:
        """Spikes divided by values; 0 before the first."""
        return self.num_spikes / max(1, self.num_values)

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": list(self.window),
            "num_values": self.num_values,
            "num_spikes": self.num_spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = deque(state["window"], maxlen=self.window.maxlen)
        self.num_values, self.num_spikes = state["num_values"], state["num_spikes"]


class SpikeWatch(StepCallback):
    """Scores the loss and gradient norm of every step; reads them from the device in bulk."""

    def __init__(self, guard: StepGuard, *, every: int) -> None:
        check_interval(every)
        self.guard, self.every = guard, every
        self.scores = {
            f"{what}_score{suffix}": SpikeScore(sigmas=sigmas, window=window)
            for what in ("loss", "grad")
            for suffix, (sigmas, window) in DEFINITIONS.items()
        }
        self.steps: list[int] = []
        self.num_over_median = self.num_over_100 = 0
        self._norms: deque[float] = deque(maxlen=128)
        self.grad_norm_max, self.grad_norm_max_step = 0.0, 0
        self._pending: list[Tensor] = []
        self._step = 0

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Keeps the step's loss and norm on their device; judges them on logged steps."""
        assert self.guard.loss is not None and self.guard.grad_norm is not None
        # Cross-entropy without further loss terms, if the module reports it separately.
        loss = getattr(pl_module, "step_losses", {}).get("loss", self.guard.loss)
        self._pending.append(torch.stack((loss, self.guard.grad_norm)))
        self._step = step
        if is_log_step(trainer, step, every=self.every):
            self._drain()
            metrics = {f"spike/{name}": score.score for name, score in self.scores.items()}
            metrics["spike/norm_over_5_medians"] = float(self.num_over_median)
            metrics["spike/norm_over_100"] = float(self.num_over_100)
            log(trainer, metrics, step=step)

    def _drain(self) -> None:
        if not self._pending:
            return
        first = self._step - len(self._pending) + 1
        for step, (loss, norm) in enumerate(torch.stack(self._pending).tolist(), start=first):
            spikes = [
                score.add(loss if name.startswith("loss") else norm)
                for name, score in self.scores.items()
            ]
            large = self._is_large(norm)
            if any(spikes) or large:
                self.steps.append(step)
            if math.isfinite(norm) and norm > self.grad_norm_max:
                self.grad_norm_max, self.grad_norm_max_step = norm, step
        self._pending.clear()

    def _is_large(self, norm: float) -> bool:
        """Whether a norm is above 100 (the write-up's bound) or 5 running medians; counts both."""
        if not math.isfinite(norm):
            return True
        over_100 = norm > LARGE_NORM
        known = sorted(self._norms)
        over_median = len(known) >= LEAST and norm > LARGE_RATIO * known[len(known) // 2]
        self._norms.append(norm)
        self.num_over_100 += over_100
        self.num_over_median += over_median
        return over_100 or over_median

    def summary(self) -> dict[str, Any]:
        """The field `spikes` of record.json."""
        self._drain()
        return {
            **{name: score.score for name, score in self.scores.items()},
            "first_step": self.steps[0] if self.steps else None,
            "steps": list(self.steps),
            "norm_over_5_medians": self.num_over_median,
            "norm_over_100": self.num_over_100,
            "grad_norm_max": self.grad_norm_max,
            "grad_norm_max_step": self.grad_norm_max_step or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Windows, counts and the largest norm."""
        self._drain()
        return {
            "scores": {name: score.state_dict() for name, score in self.scores.items()},
            "grad_norm_max": self.grad_norm_max,
            "grad_norm_max_step": self.grad_norm_max_step,
            "steps": list(self.steps),
            "large": [self.num_over_median, self.num_over_100],
            "norms": list(self._norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict["scores"].items():
            self.scores[name].load_state_dict(state)
        self.grad_norm_max = state_dict["grad_norm_max"]
        self.grad_norm_max_step = state_dict["grad_norm_max_step"]
        self.steps = list(state_dict["steps"])
        self.num_over_median, self.num_over_100 = state_dict["large"]
        self._norms = deque(state_dict["norms"], maxlen=128)
