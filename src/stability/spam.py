"""Clipping of single entries by AdamW's second moment, and moments that start again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.stability.adam_state import MOMENTS, adam_states, require_adam
from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.gradient_remedy import GradientRemedy

if TYPE_CHECKING:
    import lightning.pytorch as pl

FIRST_FACTOR = 0.01
"""The factor on the rate in the first step after a reset, as in the authors' code."""


@dataclass(kw_only=True)
class SpamConfig(RemedyConfig):
    """SPAM: spike-aware Adam with momentum reset (arXiv 2501.06842), with dense moments.

    The second moment v from before the step bounds every entry of the gradient:

        g_i <- sign(g_i) sqrt(theta v_i)   where g_i^2 > theta v_i

    Before steps T, 2T, ... both moments are set to 0. After each reset the rate is multiplied by

        1 - 0.99 (1 + cos(pi n / (warmup_steps + 1))) / 2    for n < warmup_steps, then 1

    where n counts the steps since the reset. Nothing is clipped before step clip_after, nor in the
    first clip_after steps after a reset, because v has seen too few gradients by then. These are
    the rules of the authors' code, with its values: theta 5000, T 500, warm-up 150, clip_after 20.
    As there, the step count of the bias correction is not reset.

    Departures: an entry whose v is 0 is not clipped. This is the case for a token that has not
    occurred yet; the paper's rule would set its gradient to 0 for good. The factor acts on weight
    decay too. Clipping of the norm stays on and acts afterwards. Resets count all steps, including
    skipped ones. The sparse moments of the memory-saving form are left out.
    """

    theta: float
    """Largest g^2 / v of an entry; above 0."""
    reset_every: int
    """Optimizer steps T between resets of the moments; at least 2."""
    warmup_steps: int
    """Steps after a reset in which the rate rises to the schedule's; from 0 to below T."""
    clip_after: int
    """Steps at the start and after each reset in which nothing is clipped; from 1 to below T."""

    def __post_init__(self) -> None:
        check_positive("theta", self.theta)
        if self.reset_every < 2:
            raise ValueError(f"reset_every={self.reset_every}: must be at least 2")
        if not 0 <= self.warmup_steps < self.reset_every:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}: must be at least 0 and below reset_every,"
                f" which is {self.reset_every}"
            )
        if not 1 <= self.clip_after < self.reset_every:
            raise ValueError(
                f"clip_after={self.clip_after}: must be at least 1 and below reset_every,"
                f" which is {self.reset_every}"
            )

    def lr_factor(self, step: int, max_steps: int) -> float:
        """1 before the first reset; from 0.01 to 1 after each."""
        number = step + 1
        since = number % self.reset_every
        if number < self.reset_every or since >= self.warmup_steps:
            return 1.0
        wave = (1 + math.cos(math.pi * since / (self.warmup_steps + 1))) / 2
        return 1.0 - (1 - FIRST_FACTOR) * wave

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        if self.clip_after >= parts["recipe"].max_steps:
            return f"clip_after is {self.clip_after}, and the run has no more steps"
        return super().no_op(parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [Spam(self, run)]


class Spam(GradientRemedy):
    """Clips entries and resets moments; parameters that keep no AdamW moments stay as they are.

    Logs the share of entries clipped so far, the number of resets, and the factor on the rate.
    """

    name = "spam"

    def __init__(self, config: SpamConfig, run: RunFacts) -> None:
        super().__init__(run)
        self.config = config
        self.num_clipped = torch.zeros((), dtype=torch.long)
        self.num_entries = self.num_resets = 0
        self._optimizer: torch.optim.Optimizer | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._optimizer = optimizer
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @torch.no_grad()
    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        assert self._optimizer is not None
        require_adam(self._optimizer, self.name)
        if step < self.config.clip_after or step % self.config.reset_every < self.config.clip_after:
            return False
        states = adam_states(self._optimizer)
        for gradient, (_, parameter) in zip(gradients, self.numbered, strict=True):
            self.num_entries += gradient.numel()
            if parameter not in states:
                continue
            moment = states[parameter]["exp_avg_sq"].to(gradient.dtype)
            bound = (self.config.theta * moment).sqrt()
            # A comparison with NaN is false: a non-finite entry is left to the guard.
            over = (gradient.abs() > bound) & (moment > 0) & gradient.isfinite()
            gradient.copy_(torch.where(over, gradient.sign() * bound, gradient))
            count = over.sum()
            self.num_clipped = self.num_clipped.to(count.device) + count
        return True

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        # Between steps, so that a skipped step at this place does not leave the reset out.
        if (step + 1) % self.config.reset_every == 0:
            self.num_resets += 1
            for state in adam_states(trainer.optimizers[0]).values():
                for moment in MOMENTS:
                    state[moment].zero_()
        self.figures = {
            "clipped_frac": self.num_clipped / max(1, self.num_entries),
            "resets": float(self.num_resets),
            "rate_factor": self.config.lr_factor(step - 1, self.run.max_steps),
        }
        super().on_step_end(trainer, pl_module, step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_clipped": self.num_clipped,
            "num_entries": self.num_entries,
            "num_resets": self.num_resets,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_clipped = state_dict["num_clipped"]
        self.num_entries = state_dict["num_entries"]
        self.num_resets = state_dict["num_resets"]
