"""A metric that shows that a remedy acted, read from what the remedy changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from src.stability.base import RemedyConfig, RunFacts
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


class EffectMetric(RemedyCallback):
    """Logs `stability/<name>` on logged steps.

    Args:
        name: `<remedy>_<what it did>`.
        read: returns the value. It must read the trainer or the module, not the configuration:
            otherwise the metric would not show that the remedy acted.
        run: facts about the run.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[pl.Trainer, pl.LightningModule], float],
        run: RunFacts,
    ) -> None:
        self.name, self.read, self.run = name, read, run

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        # Read only where it is logged, because reading may wait for the device.
        if self.is_log_step(trainer, step):
            self.log_at(trainer, step, {f"stability/{self.name}": self.read(trainer, pl_module)})


def count_norms(module: nn.Module, *names: str) -> float:
    """The number of submodules of these names that normalise."""
    # A norm that is switched off is an Identity, which has no gain.
    parts = (m for path, m in module.named_modules() if path.rpartition(".")[2] in names)
    return float(sum(any(True for _ in part.parameters()) for part in parts))


def lr_factor_metric(remedy: str, config: RemedyConfig, run: RunFacts) -> EffectMetric:
    """Logs the factor that a remedy has put on the learning rate of the last step."""
    return EffectMetric(
        f"{remedy}_factor",
        lambda trainer, _: config.lr_factor(trainer.global_step - 1, run.max_steps),
        run,
    )
