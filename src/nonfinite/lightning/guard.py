"""The step guard: checks the loss and gradient before the optimizer acts."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from nonfinite.buffers import BufferCopies, Copies, put_back
from nonfinite.config import GuardConfig
from nonfinite.lightning.step_callback import StepCallback, is_log_step, log
from nonfinite.update_check import UpdateCheck, UpdateFault, names_of, total_norm

TAIL_FRAC = 1 / 7
"""The final fraction of a run, over which `skipped_tail_frac` is computed."""

_TOO_MANY_PASSES = (
    "the step guard supports optimizers that compute loss and gradient once per step;"
    " {} computes them several times"
)


class StepGuard(StepCallback):
    """Skips a step whose loss or gradient is not finite, or stops the run, or raises.

    A skipped step leaves weights and optimizer state bitwise unchanged: the guard drops the
    gradients, so the optimizer has nothing to apply. Buffers that the step made non-finite, such as
    running statistics, get back the values that they had before it. Step count, schedule and data
    position still advance. The guard must be the first callback, so that it measures the gradient
    of the loss before any remedy changes it.

    A learning rate that is not finite also skips the step. Gradients that clipping made non-finite,
    and weights that an update made non-finite, are noticed directly after the update.

    Attributes:
        loss: loss of the step, mean over its micro-batches and ranks.
        grad_norm: norm of the accumulated gradient of the loss.
        current_norm: equal to grad_norm, or None once a remedy has changed the gradient.
        applied: whether the last step changed the weights.
        finite: whether loss, gradient, learning rate and update of the last step were finite, even
            if `check` leaves some of them out.
        fault: what went wrong in the last step's update, if its gradient was finite.
        buffers_before: copies of the module's buffers from before each micro-batch of the step.
        stopped: whether the guard ended the run.
        observers: called with (trainer, module, optimizer, finite) for every step, before its
            gradients may be dropped.
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
        self.fault: UpdateFault | None = None
        self.buffers_before: list[Copies] = []
        self._losses: list[Tensor] = []
        self._checked_step: int | None = None
        self._task: pl.LightningModule | None = None
        self._buffers: BufferCopies | None = None
        self._update: UpdateCheck | None = None
        self._hook: Any = None
        self._gradients_are_trusted = True

    def add_observer(self, observer: Callable[..., None]) -> None:
        """Registers an observer; a second registration has no effect."""
        if observer not in self.observers:
            self.observers.append(observer)

    @staticmethod
    def of(trainer: pl.Trainer) -> "StepGuard | None":
        """The guard among a trainer's callbacks; None if there is none."""
        guards = [c for c in trainer.callbacks if isinstance(c, StepGuard)]  # type: ignore[attr-defined]
        return guards[0] if guards else None

    def drop_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients, so that the optimizer has nothing to apply."""
        self.applied = False
        if self._task is not None and self.buffers_before:
            put_back(self._task, self.buffers_before[0], only_damaged=True)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares the checks, and stops a resumed run again if the guard had ended it.

        Raises:
            ValueError: the trainer does not have one optimizer under automatic optimization.
        """
        super().on_train_start(trainer, pl_module)
        automatic, num = pl_module.automatic_optimization, len(trainer.optimizers)
        if not automatic or num != 1:
            raise ValueError(
                "the step guard supports one optimizer under automatic optimization;"
                f" {type(pl_module).__name__} has {num} under"
                f" {'automatic' if automatic else 'manual'} optimization"
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise ValueError(_TOO_MANY_PASSES.format("LBFGS"))
        self._checked_step = None
        self._task, self._buffers = pl_module, BufferCopies(pl_module)
        self._update = UpdateCheck(trainer.optimizers[0], names_of(pl_module))
        self._gradients_are_trusted = not _may_spoil_gradients(trainer, pl_module)

        def after_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._after_update(trainer, pl_module, optimizer)

        self._hook = trainer.optimizers[0].register_step_post_hook(after_update)
        if self.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the buffers as they are before the forward pass."""
        assert self._buffers is not None
        self.buffers_before.append(self._buffers.current())

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Keeps the loss, which Lightning has already divided by the number of micro-batches."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decides whether the step is applied; all ranks decide the same.

        Raises:
            FloatingPointError: the step is not finite and on_nonfinite is raise.
            ValueError: the guard has already checked this step.
        """
        if self._checked_step == trainer.global_step:
            raise ValueError(_TOO_MANY_PASSES.format(type(optimizer).__name__))
        self._checked_step = trainer.global_step
        # If training_step returned None there is no loss: nothing to apply, and nothing wrong.
        has_loss = bool(self._losses)
        if has_loss:
            self.loss = torch.stack(self._losses).sum()
            if trainer.world_size > 1:
                # A non-finite loss on any rank makes the mean non-finite.
                self.loss = trainer.strategy.reduce(self.loss, reduce_op="mean")
        else:
            self.loss = torch.tensor(float("nan"), device=pl_module.device)
        self._losses.clear()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        self.grad_norm = self.current_norm = total_norm(gradients)
        broken = torch.stack((~self.loss.isfinite(), ~self.grad_norm.isfinite())).float() * has_loss
        bad = dict(zip(("loss", "gradients"), (broken > 0).tolist(), strict=True))
        step = trainer.global_step + 1
        assert self._update is not None
        self.fault = None if any(bad.values()) else self._update.rate_fault()
        self.finite = not any(bad.values()) and self.fault is None
        for observer in self.observers:
            observer(trainer, pl_module, optimizer, self.finite)
        self._count(bad, step)
        is_rate_bad = self.fault is not None and bool(self.config.check)
        self.applied = not (is_rate_bad or any(bad[check] for check in self.config.check))
        if self.applied:
            self.counts["consecutive"] = 0
            if not has_loss:
                self.drop_step(optimizer)
            if not self._gradients_are_trusted:
                self._update.remember_gradients()
            return
        if self.config.on_nonfinite == "raise":
            what = " and ".join(name for name, is_bad in bad.items() if is_bad)
            raise FloatingPointError(f"step {step}: non-finite {what or 'learning rate'}")
        self.drop_step(optimizer)
        self.counts["skipped_steps"] += 1
        self.counts["consecutive"] += 1
        self.counts["skipped_tail_steps"] += step > self.max_steps * (1 - TAIL_FRAC)
        limit = self.config.max_consecutive
        too_many = limit is not None and self.counts["consecutive"] >= limit
        if self.config.on_nonfinite == "stop" or too_many:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        self.stopped = True
        trainer.should_stop = True

    def _after_update(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at what was applied, where clipping or the optimizer could have divided by 0."""
        assert self._update is not None
        if not (self.applied and self.finite):
            return
        # Without a current norm, a remedy has changed the gradient.
        may_be_spoiled = not self._gradients_are_trusted or self.current_norm is None
        changed = may_be_spoiled and self._update.gradients_changed()
        self.fault = self._update.applied_fault(gradients=changed)
        if self.fault is None:
            return
        self.finite = False
        step = trainer.global_step + 1
        self.nonfinite_steps.append(step)
        for observer in self.observers:
            observer(trainer, pl_module, optimizer, False)
        if self.config.on_nonfinite == "raise":
            raise FloatingPointError(f"step {step}: {self.fault.explanation}")
        if self.config.on_nonfinite == "stop":
            self._stop(trainer)

    def _count(self, bad: dict[str, bool], step: int) -> None:
        self.counts["nonfinite_loss_steps"] += bad["loss"]
        self.counts["nonfinite_grad_steps"] += bad["gradients"]
        if not self.finite:
            self.nonfinite_steps.append(step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs the gradient norm and the counts."""
        self.buffers_before.clear()
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
        """The field `guard` of record.json."""
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
        """The counts, the numbers of non-finite steps, and whether the guard ended the run."""
        return {
            "counts": dict(self.counts),
            "nonfinite_steps": list(self.nonfinite_steps),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.stopped = dict(state_dict["counts"]), state_dict["stopped"]
        self.nonfinite_steps = list(state_dict["nonfinite_steps"])


def _may_spoil_gradients(trainer: pl.Trainer, task: pl.LightningModule) -> bool:
    """Whether code that we do not know changes gradients after the guard has seen them.

    Clipping by a norm that is finite multiplies the gradient by at most 1, and needs no second
    look.
    """
    known = ("nonfinite.", "src.", "lightning.")
    if not type(task).configure_gradient_clipping.__module__.startswith(known):
        return True
    foreign = [
        c
        for c in trainer.callbacks  # type: ignore[attr-defined]
        if not type(c).__module__.startswith(known)
    ]
    base = pl.Callback.on_before_optimizer_step
    return any(type(callback).on_before_optimizer_step is not base for callback in foreign)
