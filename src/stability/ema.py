"""An exponential moving average of the weights, for evaluation and inference."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import nn
from torch_ema import ExponentialMovingAverage

from nonfinite.guard import StepGuard
from nonfinite.step_callback import StepCallback, is_log_step, log
from src.stability.base import RemedyConfig, RunFacts, check_frac


@dataclass(kw_only=True)
class EmaConfig(RemedyConfig):
    """torch-ema as in the write-up's option 6; training itself is untouched."""

    is_passive: ClassVar[bool] = True
    keeps_average: ClassVar[bool] = True
    evaluated_as: ClassVar[str | None] = "ema"

    decay: float | None
    """Weight of the past in each update; from 0 to below 1; null where horizon_frac says it."""
    horizon_frac: float | None
    """Share of the run that the average remembers, the form that is matched to scale: the decay
    is 1 - 1 / (horizon_frac * max_steps), 0.999 for 1/11 of 11,000 steps; null where decay says it.
    The library's ramp holds the decay down for long: it reaches 0.999 at update 8,990 only.
    """

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.horizon_frac is None):
            raise ValueError(
                f"horizon_frac={self.horizon_frac}: exactly one of decay (now {self.decay})"
                " and horizon_frac must have a value, the other null"
            )
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must be at least 0 and below 1")
        if self.horizon_frac is not None:
            check_frac("horizon_frac", self.horizon_frac)

    def decay_for(self, max_steps: int) -> float:
        """The decay in a run of so many steps."""
        if self.decay is not None:
            return self.decay
        assert self.horizon_frac is not None
        return 1.0 - 1.0 / max(1.0, self.horizon_frac * max_steps)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [WeightAverage(self, run)]


class WeightAverage(StepCallback):
    """Keeps averaged weights and offers them to validation as `val_ema/`.

    Updated after applied steps only: one non-finite update would poison the average for good. The
    library's ramp min(decay, (1 + n) / (10 + n)) stays on, as in the write-up's snippet, and the
    decay in force is logged. In 440 updates it reaches 0.980: decays above that are one treatment.

    Lightning's own EMAWeightAveraging (2.6) differs in four ways: it also updates after a step that
    was skipped or not finite, because it follows the trainer's count of steps; it has no ramp; it
    averages buffers too, a router's bias among them; and it validates the average alone and leaves
    it in the model at the end, so that the raw weights are not evaluated beside it.
    """

    def __init__(self, config: EmaConfig, run: RunFacts) -> None:
        self.decay, self.run = config.decay_for(run.max_steps), run
        self.average: ExponentialMovingAverage | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts from the initial weights, or from a checkpoint's average."""
        params = [p for p in pl_module.parameters() if p.requires_grad]
        self._check_dtype(params)
        self.average = ExponentialMovingAverage(params, decay=self.decay)
        if self._restored is not None:
            self.average.load_state_dict(self._restored)

    @staticmethod
    def _check_dtype(params: list[nn.Parameter]) -> None:
        for parameter in params:
            # torch-ema's shadow has the dtype of the parameter, and with eight bits of mantissa
            # steps of (1 - decay) vanish: the average would never move.
            if parameter.element_size() < 4:
                raise ValueError(f"ema needs float32 parameters, found {parameter.dtype}")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Updates after a step that changed the weights."""
        assert self.average is not None
        if StepGuard.step_was_sound(trainer):
            self.average.update()
        if is_log_step(trainer, step, every=self.run.log_every):
            updates = self.average.num_updates or 0
            decay = min(self.decay, (1 + updates) / (10 + updates))
            metrics = {"stability/ema_updates": float(updates), "stability/ema_decay": decay}
            log(trainer, metrics, step=step)

    def evaluation_weights(self) -> dict[str, Any]:
        """The averaged weights, for Validation."""
        return {"ema": self.averaged}

    def averaged(self) -> AbstractContextManager[None]:
        """Inside this context the model holds the averaged weights."""
        assert self.average is not None
        return self.average.average_parameters()

    def state_dict(self) -> dict[str, Any]:
        """The shadow weights and their count."""
        return self.average.state_dict() if self.average is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the parameters are there to be averaged."""
        self._restored = state_dict
        if self.average is not None:
            self.average.load_state_dict(state_dict)
