"""The step guard: looks at loss and gradient before the optimizer acts."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from nonfinite.config import GuardConfig
from nonfinite.step_callback import StepCallback, is_log_step, log

TAIL_FRAC = 1 / 7
"""The last part of a run, over which `skipped_tail_frac` is taken."""

_SEVERAL = (
    "the step guard serves optimizers that compute loss and gradient once a step,"
    " {} does it several times"
)


class StepGuard(StepCallback):
    """Skips, stops at or raises on a step whose loss or gradient is not finite.

    A skipped step leaves weights and optimizer bitwise as they were: the gradients are dropped, so
    the optimizer finds nothing to do. Step count, schedule and data position go on. To be placed
    first among the callbacks: the norm it takes is that of the loss gradient, before any remedy.

    Attributes:
        loss: of the step, mean over its micro-batches and ranks.
        grad_norm: of the accumulated gradient of the loss.
        current_norm: the same until a remedy changes the gradient and sets it to None.
        applied: whether the last step changed the weights.
        finite: whether its loss and gradient were finite, checked or not.
        stopped: whether the guard ended the run.
        observers: called with (trainer, module, optimizer, finite) while the gradients are still
            there, whatever becomes of the step.
    """

    def __init__(self, config: GuardConfig, *, max_steps: int, log_every: int) -> None:
        for field, value in (("max_steps", max_steps), ("log_every", log_every)):
            if value < 1:
                raise ValueError(f"{field}={value}: must be at least 1")
        self.config, self.max_steps, self.log_every = config, max_steps, log_every
        self.loss: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.current_norm: Tensor | None = None
        self.applied = self.finite = True
        self.stopped = False
        self.counts: dict[str, int] = {
            "nonfinite_loss_steps": 0,
            "nonfinite_grad_steps": 0,
            "skipped_steps": 0,
            "skipped_tail_steps": 0,
            "consecutive": 0,
        }
        self.nonfinite_steps: list[int] = []
        self.observers: list[Callable[..., None]] = []
        self._losses: list[Tensor] = []
        self._judged: int | None = None

    def add_observer(self, observer: Callable[..., None]) -> None:
        """Lets it see each step, once, however often it asks."""
        if observer not in self.observers:
            self.observers.append(observer)

    @staticmethod
    def of(trainer: pl.Trainer) -> "StepGuard | None":
        """The guard among a trainer's callbacks, if there is one."""
        guards = [c for c in trainer.callbacks if isinstance(c, StepGuard)]  # type: ignore[attr-defined]
        return guards[0] if guards else None

    @staticmethod
    def step_was_sound(trainer: pl.Trainer) -> bool:
        """Whether the last step was finite and applied; True for a trainer without a guard."""
        guard = StepGuard.of(trainer)
        return guard is None or (guard.applied and guard.finite)

    def drop_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the gradients away, so that the optimizer finds nothing to do."""
        self.applied = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was ended and is resumed stays ended.

        Raises:
            ValueError: there is no one optimizer that Lightning steps by itself, once a step.
        """
        super().on_train_start(trainer, pl_module)
        automatic, num = pl_module.automatic_optimization, len(trainer.optimizers)
        if not automatic or num != 1:
            raise ValueError(
                "the step guard serves one optimizer under automatic optimization,"
                f" {type(pl_module).__name__} has {num} under"
                f" {'automatic' if automatic else 'manual'} optimization"
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise ValueError(_SEVERAL.format("LBFGS"))
        self._judged = None
        if self.stopped:
            trainer.should_stop = True

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Lightning has divided the loss by the number of micro-batches already."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decides about the step, on all ranks alike.

        Raises:
            FloatingPointError: it is not finite, and the guard is to raise.
            ValueError: it has decided about this step already.
        """
        if self._judged == trainer.global_step:
            raise ValueError(_SEVERAL.format(type(optimizer).__name__))
        self._judged = trainer.global_step
        # No loss at all is what a training_step that returns None leaves: nothing to apply, and
        # nothing wrong.
        has_loss = bool(self._losses)
        if has_loss:
            self.loss = torch.stack(self._losses).sum()
            if trainer.world_size > 1:
                # A mean hides no rank that is not finite; gradients are averaged already.
                self.loss = trainer.strategy.reduce(self.loss, reduce_op="mean")
        else:
            self.loss = torch.tensor(float("nan"), device=pl_module.device)
        self._losses.clear()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        self.grad_norm = self.current_norm = torch.nn.utils.get_total_norm(gradients)
        broken = torch.stack((~self.loss.isfinite(), ~self.grad_norm.isfinite())).float() * has_loss
        bad = dict(zip(("loss", "gradients"), (broken > 0).tolist(), strict=True))
        step = trainer.global_step + 1
        self.finite = not any(bad.values())
        for observer in self.observers:
            observer(trainer, pl_module, optimizer, self.finite)
        self._count(bad, step)
        self.applied = not any(bad[check] for check in self.config.check)
        if self.applied:
            self.counts["consecutive"] = 0
            if not has_loss:
                self.drop_step(optimizer)
            return
        if self.config.on_nonfinite == "raise":
            what = " and ".join(name for name, is_bad in bad.items() if is_bad)
            raise FloatingPointError(f"step {step}: non-finite {what}")
        self.drop_step(optimizer)
        self.counts["skipped_steps"] += 1
        self.counts["consecutive"] += 1
        self.counts["skipped_tail_steps"] += step > self.max_steps * (1 - TAIL_FRAC)
        limit = self.config.max_consecutive
        too_many = limit is not None and self.counts["consecutive"] >= limit
        if self.config.on_nonfinite == "stop" or too_many:
            self.stopped = True
            trainer.should_stop = True

    def _count(self, bad: dict[str, bool], step: int) -> None:
        self.counts["nonfinite_loss_steps"] += bad["loss"]
        self.counts["nonfinite_grad_steps"] += bad["gradients"]
        if any(bad.values()):
            self.nonfinite_steps.append(step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs the gradient norm and the counters."""
        if is_log_step(trainer, step, every=self.log_every):
            assert self.grad_norm is not None
            metrics = {
                "grad/norm": self.grad_norm.item(),
                "guard/nonfinite_loss": self.counts["nonfinite_loss_steps"],
                "guard/nonfinite_grad": self.counts["nonfinite_grad_steps"],
                "guard/skipped": self.counts["skipped_steps"],
            }
            log(trainer, metrics, step=step)

    def summary(self) -> dict[str, Any]:
        """The guard's part of the record."""
        tail_steps = self.max_steps - int(self.max_steps * (1 - TAIL_FRAC))
        counts = self.counts
        return {
            "nonfinite_loss_steps": counts["nonfinite_loss_steps"],
            "nonfinite_grad_steps": counts["nonfinite_grad_steps"],
            "skipped_steps": counts["skipped_steps"],
            "skipped_tail_frac": counts["skipped_tail_steps"] / tail_steps,
            "first_nonfinite_step": self.nonfinite_steps[0] if self.nonfinite_steps else None,
            "nonfinite_steps": list(self.nonfinite_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """The counters, the steps that were not finite, and whether the run was ended."""
        return {
            "counts": dict(self.counts),
            "nonfinite_steps": list(self.nonfinite_steps),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.counts, self.stopped = dict(state_dict["counts"]), state_dict["stopped"]
        self.nonfinite_steps = list(state_dict["nonfinite_steps"])
