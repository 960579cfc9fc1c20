"""An exponential moving average of the weights, for evaluation and inference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch_ema import ExponentialMovingAverage

from src.stability.base import RemedyConfig, RunFacts, check_frac
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class EmaConfig(RemedyConfig):
    """Weight averaging by torch-ema, option 6 of the write-up; training itself does not change."""

    is_passive: ClassVar[bool] = True
    keeps_average: ClassVar[bool] = True
    evaluated_as: ClassVar[str | None] = "ema"

    decay: float | None
    """Weight of the past in each update; from 0 to below 1; null if horizon_frac is set."""
    horizon_frac: float | None
    """Fraction of the run that the average remembers, for comparing runs of different length; null
    if decay is set. The decay is 1 - 1 / (horizon_frac * max_steps), for example 0.999 for 1/11 of
    11,000 steps. The library's warm-up keeps the decay lower for long: it allows 0.999 only from
    update 8,990 on."""

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.horizon_frac is None):
            raise ValueError(
                f"horizon_frac={self.horizon_frac}: set exactly one of decay (now {self.decay})"
                " and horizon_frac, and the other to null"
            )
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must be at least 0 and below 1")
        if self.horizon_frac is not None:
            check_frac("horizon_frac", self.horizon_frac)

    def check(self, parts: Mapping[str, Any]) -> None:
        if parts["recipe"].precision == "bf16-true":
            raise ValueError(
                "decay: an average of bfloat16 weights would round most updates away, so ema needs"
                " recipe.precision=32-true or bf16-mixed"
            )

    def decay_for(self, max_steps: int) -> float:
        """The decay in a run of `max_steps` steps."""
        if self.decay is not None:
            return self.decay
        assert self.horizon_frac is not None
        return 1.0 - 1.0 / max(1.0, self.horizon_frac * max_steps)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [WeightAverage(self, run)]


class WeightAverage(RemedyCallback):
    """Averages the weights; validation evaluates the average as `val_ema/`.

    The average is updated only after applied steps, because one non-finite update would make it
    non-finite for good. As in the write-up's code, the library's warm-up of the decay,
    min(decay, (1 + n) / (10 + n)) at update n, stays on; the decay in use is logged. After 440
    updates it has reached 0.980, so in so short a run all higher decays are the same treatment.

    Lightning's EMAWeightAveraging (2.6) differs in four ways. It counts the trainer's steps, so it
    also updates after a skipped or non-finite step. It has no warm-up. It averages buffers as well,
    including a router's bias. It validates the average only and leaves it in the model at the end,
    so the raw weights are not evaluated.
    """

    def __init__(self, config: EmaConfig, run: RunFacts) -> None:
        self.decay, self.run = config.decay_for(run.max_steps), run
        self.average: ExponentialMovingAverage | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts from the initial weights, or from the average in a checkpoint."""
        params = [p for p in pl_module.parameters() if p.requires_grad]
        self._check_dtype(params)
        self.average = ExponentialMovingAverage(params, decay=self.decay)
        if self._restored is not None:
            self.average.load_state_dict(self._restored)

    @staticmethod
    def _check_dtype(params: list[nn.Parameter]) -> None:
        for parameter in params:
            # torch-ema keeps the average in the parameter's dtype. In bfloat16, with 8 bits of
            # mantissa, an update by (1 - decay) rounds to nothing: the average would never move.
            if parameter.element_size() < 4:
                raise ValueError(f"ema needs float32 parameters, found {parameter.dtype}")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self.average is not None
        guard = self.guard_of(trainer)
        if guard is None or (guard.applied and guard.finite):
            self.average.update()
        if self.is_log_step(trainer, step):
            updates = self.average.num_updates or 0
            decay = min(self.decay, (1 + updates) / (10 + updates))
            metrics = {"stability/ema_updates": float(updates), "stability/ema_decay": decay}
            self.log_at(trainer, step, metrics)

    def evaluation_weights(self) -> dict[str, Any]:
        """Contexts by name; inside, the model holds the averaged weights. Validation calls this."""
        return {"ema": self.averaged}

    def averaged(self) -> AbstractContextManager[None]:
        assert self.average is not None
        return self.average.average_parameters()

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Before on_fit_start there is no average yet that could be loaded.
        self._restored = state_dict
        if self.average is not None:
            self.average.load_state_dict(state_dict)
