"""The figure of an option that acts by what it sets: read from the parts that it has changed."""

from collections.abc import Callable

import lightning.pytorch as pl
from torch import nn

from nonfinite.step_callback import StepCallback, is_log_step, log
from src.stability.base import RemedyConfig, RunFacts


class Figure(StepCallback):
    """Logs `stability/<name>` on logged steps.

    Args:
        name: `<option>_<what it did>`.
        read: the figure, from trainer and module as they are, not from the configuration.
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
        """Reads and logs."""
        if is_log_step(trainer, step, every=self.run.log_every):
            log(trainer, {f"stability/{self.name}": self.read(trainer, pl_module)}, step=step)


def count_norms(module: nn.Module, *names: str) -> float:
    """How many submodules of these names normalise, which those with a gain do."""
    parts = (m for path, m in module.named_modules() if path.rpartition(".")[2] in names)
    return float(sum(any(True for _ in part.parameters()) for part in parts))


def factor_figure(option: str, config: RemedyConfig, run: RunFacts) -> Figure:
    """The factor that an option has put on the rate of the last step."""
    return Figure(
        f"{option}_factor",
        lambda trainer, _: config.lr_factor(trainer.global_step - 1, run.max_steps),
        run,
    )
