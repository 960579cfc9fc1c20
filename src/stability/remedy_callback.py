"""The base class of the callbacks of remedies, which imports Lightning only when one is made.

A remedy's configuration and its callback stand in one file. Commands that train nothing, such as
`describe` and `report`, read the configuration, and importing Lightning would take most of their
time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from src.stability.base import RunFacts

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from nonfinite.lightning.guard import StepGuard
    from nonfinite.lightning.step_callback import StepCallback
else:
    StepCallback = object


class RemedyCallback(StepCallback):
    """A `StepCallback` of `nonfinite.lightning`, from the moment on in which it is created."""

    run: RunFacts
    """Facts about the run, which every subclass sets."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class that Lightning knows as a callback."""
        # As Any, because mypy takes the hash of a class for that of its instances.
        own: Any = cls
        return super().__new__(_with_lightning(own))

    def log_at(self, trainer: pl.Trainer, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step, if the step is one whose metrics are logged."""
        from nonfinite.lightning.step_callback import log

        if self.is_log_step(trainer, step):
            log(trainer, metrics, step=step)

    def is_log_step(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether the metrics of a step are logged."""
        from nonfinite.lightning.step_callback import is_log_step

        return is_log_step(trainer, step, every=self.run.log_every)

    @staticmethod
    def guard_of(trainer: pl.Trainer) -> StepGuard | None:
        """The step guard among the trainer's callbacks; None if there is none."""
        from nonfinite.lightning.guard import StepGuard

        return StepGuard.of(trainer)


def refuse_sharded(trainer: pl.Trainer, remedy: str) -> None:
    """Raises ValueError if the processes of a trainer hold parts of tensors.

    With one device or DDP, every process holds whole tensors and the same gradients, so that all
    compute the same norms.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__}: {remedy} needs whole tensors in every"
            " process; use one device or DDP"
        )


@functools.cache
def _with_lightning(cls: type) -> type:
    """The class itself with `StepCallback` below it; its name stays, which checkpoints hold."""
    from nonfinite.lightning.step_callback import StepCallback

    if issubclass(cls, StepCallback):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, StepCallback), names)
