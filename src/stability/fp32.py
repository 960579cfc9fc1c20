"""Full precision in the last part of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from src.stability.base import RemedyConfig, RunFacts, check_frac
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class Fp32Config(RemedyConfig):
    """float32 "for the final steps", as the heading of the write-up's option 4 says.

    The write-up also lowers the precision of float32 matrix products. With that setting the result
    would not be float32, so from the switch on matrix products are in full precision.
    """

    start_frac: float
    """Fraction of the run before the switch; from 0 to 1."""

    def __post_init__(self) -> None:
        check_frac("start_frac", self.start_frac)

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        recipe = parts["recipe"]
        if recipe.precision == "32-true" and recipe.matmul_precision == "highest":
            return "recipe.precision is 32-true already"
        return super().no_op(parts)

    def check(self, parts: Mapping[str, Any]) -> None:
        if parts["recipe"].precision == "bf16-true":
            raise ValueError(
                f"start_frac={self.start_frac}: the weights of recipe.precision=bf16-true stay in"
                " bfloat16; type stability=fp32_full, or recipe.precision=bf16-mixed"
            )

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [PrecisionSwitch(self, run)]


class PrecisionSwitch(RemedyCallback):
    """Switches autocast off between two steps; weights and optimizer state do not change."""

    def __init__(self, config: Fp32Config, run: RunFacts) -> None:
        self.run = run
        self.start_step = run.step_at(config.start_frac)
        self.active = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        from lightning.pytorch.plugins.precision import Precision

        # Not an equality: a resumed run must switch at its first step.
        if not self.active and trainer.global_step >= self.start_step:
            self.active = True
            trainer.strategy.precision_plugin = Precision()
            torch.set_float32_matmul_precision("highest")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.log_at(trainer, step, {"stability/fp32_active": float(self.active)})
