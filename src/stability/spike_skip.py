"""Skips steps whose loss or gradient norm is an outlier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class SpikeSkipConfig(RemedyConfig):
    """Skips a step whose loss or gradient norm is an outlier, like OLMo-core's SkipStepOptimizer.

    Non-finite values never enter the window. In early versions of OLMo-core one NaN stayed among
    the last 128 values, so that 129 steps in a row were skipped; later versions drop such values.

    Lightning's SpikeDetection (2.6) does not skip: it ends the run with an exception and writes the
    batches to a file, for a restart without them. It compares only the loss, with a running mean
    over 10 steps.
    """

    sigmas: float
    """Standard deviations above the window's mean from which a value is an outlier; above 0."""

    def __post_init__(self) -> None:
        check_positive("sigmas", self.sigmas)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [SpikeSkip(self, run)]


class SpikeSkip(RemedyCallback):
    """Drops the gradients of an outlier step. The trainer must have a StepGuard."""

    def __init__(self, config: SpikeSkipConfig, run: RunFacts) -> None:
        from nonfinite.lightning.spikes import SpikeScore

        self.run = run
        self.scores = {name: SpikeScore(sigmas=config.sigmas) for name in ("loss", "norm")}
        self.num_skipped = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        guard = self.guard_of(trainer)
        if guard is None:
            raise ValueError("spike_skip needs a StepGuard among the trainer's callbacks")
        assert guard.loss is not None
        assert guard.grad_norm is not None
        loss, norm = torch.stack((guard.loss, guard.grad_norm)).tolist()
        spikes = [self._judge("loss", loss), self._judge("norm", norm)]
        if any(spikes) and guard.applied:
            self.num_skipped += 1
            guard.drop_step(optimizer)

    def _judge(self, name: str, value: float) -> bool:
        spike = self.scores[name].add(value)
        if spike and math.isfinite(value):
            # SpikeScore keeps spikes out of its window. The remedy must adapt to a new level: a
            # skipped step changes no weight, so otherwise it would skip every step from here on.
            self.scores[name].window.append(value)
        return spike

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.log_at(trainer, step, {"stability/spike_skip_skipped": float(self.num_skipped)})

    def state_dict(self) -> dict[str, Any]:
        scores = {name: score.state_dict() for name, score in self.scores.items()}
        return {"scores": scores, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict["scores"].items():
            self.scores[name].load_state_dict(state)
        self.num_skipped = state_dict["num_skipped"]
