"""Steps that are outliers are not applied."""

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from nonfinite.guard import StepGuard
from nonfinite.spikes import SpikeScore
from nonfinite.step_callback import StepCallback, is_log_step, log
from src.stability.base import RemedyConfig, RunFacts, check_positive


@dataclass(kw_only=True)
class SpikeSkipConfig(RemedyConfig):
    """Skips a step whose loss or gradient norm stands out (as OLMo-core's SkipStepOptimizer).

    Values that are not finite never enter the window. In OLMo-core one NaN stayed in the list of
    the last 128 values, so that 129 steps in a row were skipped before training went on; its later
    versions leave such values out, as we do.

    Lightning's own SpikeDetection (2.6) skips no step: it ends the run with an exception and writes
    the batches to a file, for a restart without them. It looks at the loss alone, against a running
    mean of 10.
    """

    sigmas: float
    """Standard deviations above the mean of the window; above 0."""

    def __post_init__(self) -> None:
        check_positive("sigmas", self.sigmas)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [SpikeSkip(self, run)]


class SpikeSkip(StepCallback):
    """Drops the gradients of such a step, as the guard does; needs the guard in the trainer."""

    def __init__(self, config: SpikeSkipConfig, run: RunFacts) -> None:
        self.run = run
        self.scores = {name: SpikeScore(sigmas=config.sigmas) for name in ("loss", "norm")}
        self.num_skipped = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judges the step by the figures that the guard has taken."""
        guard = StepGuard.of(trainer)
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
            # Unlike the score, the remedy must get used to a new level: a skipped step changes no
            # weight, so otherwise it would skip for ever.
            self.scores[name].window.append(value)
        return spike

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs how many it has skipped."""
        if is_log_step(trainer, step, every=self.run.log_every):
            log(trainer, {"stability/spike_skip_skipped": float(self.num_skipped)}, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Windows and count."""
        scores = {name: score.state_dict() for name, score in self.scores.items()}
        return {"scores": scores, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        for name, state in state_dict["scores"].items():
            self.scores[name].load_state_dict(state)
        self.num_skipped = state_dict["num_skipped"]
