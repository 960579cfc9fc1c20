"""Changes attributes of the routers in the middle of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from src.stability.base import RunFacts
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


class RouterOverride(RemedyCallback):
    """Sets attributes of every module that has a method `router_stats`, once, between two steps.

    A router must read `norm_eps` and `bias_frozen` from itself at each use.
    """

    def __init__(self, name: str, start_frac: float, run: RunFacts, **values: Any) -> None:
        self.name, self.run, self.values = name, run, values
        self.start_step = run.step_at(start_frac)
        self.active = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # `active` is not saved: a resumed run has new modules, so they must be changed again.
        if self.active or trainer.global_step < self.start_step:
            return
        self.active = True
        for module in pl_module.modules():
            if hasattr(module, "router_stats"):
                for field, value in self.values.items():
                    setattr(cast(Any, module), field, value)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.log_at(trainer, step, {f"stability/{self.name}_active": float(self.active)})
