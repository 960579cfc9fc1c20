"""Base class of remedies that change the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from src.stability.base import RunFacts
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GradientRemedy(RemedyCallback, ABC):
    """Calls `change` with the gradients of each applied step, before norm clipping.

    A step that the guard has dropped has no gradients left, so `change` is not called.
    """

    name = ""

    def __init__(self, run: RunFacts) -> None:
        self.run = run
        self.figures: dict[str, Tensor | float] = {}
        self.numbered: list[tuple[int, nn.Parameter]] = []
        """The parameters of the gradients, each with its place among all of the optimizer's."""

    @abstractmethod
    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        """Changes the gradients in place.

        Args:
            gradients: one for each parameter that has one.
            norm: their total L2 norm.
            step: number of the step, from 1.

        Returns:
            Whether any gradient was changed.
        """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.numbered = [(n, p) for n, p in enumerate(params) if p.grad is not None]
        gradients = [p.grad for p in params if p.grad is not None]
        if not gradients:
            return
        guard = self.guard_of(trainer)
        norm = None if guard is None else guard.current_norm
        if norm is None:
            norm = torch.nn.utils.get_total_norm(gradients)
        changed = self.change(gradients, norm=norm, step=trainer.global_step + 1)
        if changed and guard is not None:
            # The norm that the guard measured is out of date; clipping must compute it itself.
            guard.current_norm = None

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs `figures` as stability/<name>_<figure>."""
        if self.is_log_step(trainer, step) and self.figures:
            metrics = {f"stability/{self.name}_{k}": float(v) for k, v in self.figures.items()}
            self.log_at(trainer, step, metrics)
