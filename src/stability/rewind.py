"""Back to an earlier state at a spike, past the batches that led to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from src.common import terminal
from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.remedy_callback import RemedyCallback, refuse_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

Snapshot = dict[str, Any]
"""The state after a step: its number, tensors of the module, the optimizer, other remedies, and
this remedy's scores."""


@dataclass(kw_only=True)
class RewindConfig(RemedyConfig):
    """Restart before a spike and skip data (PaLM, arXiv 2204.02311, section 5.1; BLOOM).

    PaLM's authors restarted from a checkpoint about 100 steps before a spike and skipped 200 to 500
    batches, those seen before and during the spike; about 20 times in one run. Here, if step t is a
    spike or not finite:

        state <- the newest snapshot at least back_steps older than step t, or else the oldest
        batch of the next step <- batch t + 1

    The step number never goes back. A batch is a function of (seed, step, rank), so the next batch
    is t + 1, and those between the snapshot's step and t are not seen again. Schedules and
    max_steps count steps. A rewind therefore costs as many steps as it goes back, and an arm with
    rewinds computes as many steps as its baseline. Random generators do not go back either.

    What goes back is weights, buffers, optimizer state (with the step count of AdamW's bias
    correction), and the state of all other remedies, such as the average of `ema`.

    A spike is what it is for `spike_skip`: a loss or gradient norm that is not finite or, from 64
    values on, more than `sigmas` standard deviations above the mean of the last 128 values that
    were no spikes. The window goes back too.

    Departures: PaLM's step number and learning rate went back with the state, and batches after the
    spike were skipped as well. After max_rewinds rewinds it no longer goes back.

    Cost: at most ceil(back_steps / every) + 1 snapshots in the memory of the CPU, each as large as
    weights, buffers and optimizer state (with AdamW three times the weights) and the state of other
    remedies, and a copy of them every `every` steps. Every checkpoint holds them, so that a resumed
    run can go back.
    """

    sigmas: float
    """Standard deviations above the window's mean from which a value is a spike; above 0."""
    back_steps: int
    """Least number of optimizer steps to go back, if a snapshot is that old; at least 1."""
    every: int
    """Optimizer steps between snapshots; at least 1."""
    max_rewinds: int
    """Largest number of rewinds in a run; at least 1."""

    def __post_init__(self) -> None:
        check_positive("sigmas", self.sigmas)
        for field in ("back_steps", "every", "max_rewinds"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")

    @property
    def num_snapshots(self) -> int:
        """The largest number of snapshots that are held."""
        return math.ceil(self.back_steps / self.every) + 1

    def check(self, parts: Mapping[str, Any]) -> None:
        check_guard(self, parts["guard"])

    def num_weight_copies(self, device: str) -> int:
        return 3 * self.num_snapshots if device == "cpu" else 0

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [Rewind(self, run)]


def check_guard(config: RewindConfig, guard: Any) -> None:
    """Raises ValueError if the guard ends the run at the step at which the remedy would act."""
    why = None
    if guard.on_nonfinite != "skip":
        why = f"guard.on_nonfinite=skip; it is {guard.on_nonfinite}"
    elif guard.max_consecutive == 1:
        why = "guard.max_consecutive of at least 2, or null; it is 1"
    if why is not None:
        raise ValueError(f"max_rewinds={config.max_rewinds}: needs {why}")


class Rewind(RemedyCallback):
    """Keeps snapshots and goes back to one. The trainer must have a StepGuard.

    The spike's own step is dropped, so that an average, for example, does not take it for a sound
    one. The state is put back at the end of the step, before validation and checkpoints see it.
    With DDP all processes have the same loss and norm, so that all go back at the same step, each
    to its own snapshot; after a resumption, to that of rank 0, which the checkpoint holds.

    Logs the number of rewinds, of steps that they undid, and of snapshots.
    """

    def __init__(self, config: RewindConfig, run: RunFacts) -> None:
        from nonfinite.lightning.spikes import SpikeScore

        self.config, self.run = config, run
        self.scores = {name: SpikeScore(sigmas=config.sigmas) for name in ("loss", "norm")}
        self.snapshots: list[Snapshot] = []
        self.num_rewinds = self.num_undone = self.last_rewind = 0
        self._reason: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the remedy can act in this run."""
        super().on_train_start(trainer, pl_module)
        guard = self.guard_of(trainer)
        if guard is None:
            raise ValueError("rewind needs a StepGuard among the trainer's callbacks")
        check_guard(self.config, guard.config)
        refuse_sharded(trainer, "rewind")
        self._reason = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the state before the first step, and after every `every` steps.

        Not at the end of the step itself, because callbacks behind this one, such as an average,
        have not finished the step then.
        """
        step = trainer.global_step
        if not self.snapshots or (
            step % self.config.every == 0
            and step > max(self.snapshots[-1]["step"], self.last_rewind)
        ):
            self.snapshots.append(self._snapshot(trainer, pl_module, step))
            # Drops those to which no later spike would go back.
            del self.snapshots[: self._target(step + 1)]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        guard = self.guard_of(trainer)
        assert guard is not None and guard.loss is not None and guard.grad_norm is not None
        values = torch.stack((guard.loss, guard.grad_norm)).tolist()
        spikes = [self.scores[n].add(v) for n, v in zip(("loss", "norm"), values, strict=True)]
        if any(spikes) and self.num_rewinds < self.config.max_rewinds:
            reasons = [
                f"{'spike of' if math.isfinite(value) else 'non-finite'} {name}"
                for name, value, is_spike in zip(
                    ("loss", "gradient norm"), values, spikes, strict=True
                )
                if is_spike
            ]
            self._reason = " and ".join(reasons)
            if guard.applied:
                guard.drop_step(optimizer)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        guard = self.guard_of(trainer)
        assert guard is not None
        if not guard.finite and self.num_rewinds < self.config.max_rewinds:
            # Not the gradient, but the learning rate or the optimizer's update was the fault.
            fault = "non-finite step" if guard.fault is None else guard.fault.summary
            self._reason = self._reason or fault
        if self._reason is not None:
            self._go_back(trainer, pl_module, step)
        if self.is_log_step(trainer, step):
            metrics = {
                "stability/rewind_rewinds": float(self.num_rewinds),
                "stability/rewind_undone_steps": float(self.num_undone),
                "stability/rewind_snapshots": float(len(self.snapshots)),
            }
            self.log_at(trainer, step, metrics)

    def _target(self, step: int) -> int:
        """Place of the snapshot to go back to from a step: old enough, or else the oldest."""
        steps = [snapshot["step"] for snapshot in self.snapshots]
        return max(0, sum(number <= step - self.config.back_steps for number in steps) - 1)

    def _go_back(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        # Later snapshots belong to the path that is abandoned.
        del self.snapshots[self._target(step) + 1 :]
        target = self.snapshots[-1]
        self._restore(trainer, module, target)
        self.num_rewinds += 1
        # The last rewind has undone the steps before it already.
        self.num_undone += step - max(target["step"], self.last_rewind)
        self.last_rewind = step
        if trainer.is_global_zero:
            terminal.warn(
                f"step {step}: {self._reason}; training goes on from the state of step"
                f" {target['step']} with the batch of step {step + 1}"
                f" (rewind {self.num_rewinds} of {self.config.max_rewinds})"
            )
        self._reason = None

    def _snapshot(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> Snapshot:
        return {
            "step": step,
            "tensors": _copied(_tensors(module)),
            "optimizer": _copied(
                {
                    index: trainer.optimizers[0].state[parameter]
                    for index, parameter in enumerate(_parameters(trainer))
                    if parameter in trainer.optimizers[0].state
                }
            ),
            "remedies": {n: _copied(c.state_dict()) for n, c in self._others(trainer).items()},
            "scores": {name: score.state_dict() for name, score in self.scores.items()},
        }

    @torch.no_grad()
    def _restore(self, trainer: pl.Trainer, module: pl.LightningModule, saved: Snapshot) -> None:
        for name, tensor in _tensors(module).items():
            tensor.copy_(saved["tensors"][name])
        optimizer = trainer.optimizers[0]
        for index, parameter in enumerate(_parameters(trainer)):
            now = optimizer.state.pop(parameter, {})
            if index in saved["optimizer"]:
                optimizer.state[parameter] = {
                    # AdamW may keep its step count on the CPU.
                    name: value.to(now.get(name, parameter).device, copy=True)
                    if isinstance(value, Tensor)
                    else copy.deepcopy(value)
                    for name, value in saved["optimizer"][index].items()
                }
        for name, callback in self._others(trainer).items():
            if name in saved["remedies"]:
                callback.load_state_dict(_copied(saved["remedies"][name]))
        for name, score in self.scores.items():
            score.load_state_dict(saved["scores"][name])

    def _others(self, trainer: pl.Trainer) -> dict[str, pl.Callback]:
        """The callbacks of the other remedies, by the name under which checkpoints hold them."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return {
            c.state_key: c for c in callbacks if isinstance(c, RemedyCallback) and c is not self
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": {name: score.state_dict() for name, score in self.scores.items()},
            "snapshots": list(self.snapshots),
            "num_rewinds": self.num_rewinds,
            "num_undone": self.num_undone,
            "last_rewind": self.last_rewind,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict["scores"].items():
            self.scores[name].load_state_dict(state)
        self.snapshots = list(state_dict["snapshots"])
        self.num_rewinds, self.num_undone = state_dict["num_rewinds"], state_dict["num_undone"]
        self.last_rewind = state_dict["last_rewind"]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that checkpoints leave out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _parameters(trainer: pl.Trainer) -> list[nn.Parameter]:
    return [p for group in trainer.optimizers[0].param_groups for p in group["params"]]


def _copied(tree: Any) -> Any:
    """A copy in the memory of the CPU that shares nothing with the original."""
    return tree_map(
        lambda leaf: (
            leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
        ),
        tree,
    )
