"""A small run without the command: parts of a run that a test wants to hold in its hands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from nonfinite.config import GuardConfig
from nonfinite.lightning.guard import StepGuard
from src.data.batches import TrainBatches
from src.training.recipe import RecipeConfig
from src.training.task import LanguageModelTask
from tests.builders import VOCAB, transformer

TEXT = np.random.default_rng(0).integers(VOCAB, size=500).astype(np.uint16)


def recipe_config(**changes: Any) -> RecipeConfig:
    values: dict[str, Any] = {
        "max_steps": 6,
        "batch_size": 2,
        "seq_len": 8,
        "accumulate": 1,
        "learning_rate": 1e-2,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "decay_params": "all",
        "fused": True,
        "warmup_frac": 0.0,
        "schedule": "constant",
        "precision": "32-true",
        "matmul_precision": "highest",
        "clip_norm": 1.0,
        "z_loss_weight": 0.0,
        "num_validations": 1,
        "val_windows": None,
        "log_every": 1,
        "checkpoint_every": None,
    }
    return RecipeConfig(**(values | changes))


def guard_config(**changes: Any) -> GuardConfig:
    values: dict[str, Any] = {
        "check": ["loss", "gradients"],
        "on_nonfinite": "skip",
        "max_consecutive": None,
        "on_alarm": "none",
    }
    return GuardConfig(**(values | changes))


class Recorder(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.setdefault(step, {}).update(metrics)


class Snapshots(pl.Callback):
    """Copies all state after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.states.append(snapshot(trainer, pl_module))


def snapshot(trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()["state"]
    averages = [c.average for c in trainer.callbacks if getattr(c, "average", None) is not None]
    return {
        "weights": {k: v.clone() for k, v in task.state_dict().items()},
        "optimizer": {k: {n: t.clone() for n, t in v.items()} for k, v in optimizer.items()},
        "averages": [[t.clone() for t in a.shadow_params] for a in averages],
        "updates": [a.num_updates for a in averages],
    }


@dataclass
class Harness:
    """Task, guard, trainer and what they leave."""

    recipe: RecipeConfig = field(default_factory=recipe_config)
    guard: GuardConfig = field(default_factory=guard_config)
    callbacks: list[pl.Callback] = field(default_factory=list)
    model: Any = None
    seed: int = 0
    replace_optimizer: Any = lambda optimizer, _: optimizer

    def __post_init__(self) -> None:
        self.step_guard = StepGuard(
            self.guard, max_steps=self.recipe.max_steps, log_every=self.recipe.log_every
        )
        self.task = LanguageModelTask(
            model=self.model or transformer(max_seq_len=self.recipe.seq_len),
            recipe=self.recipe,
            guard=self.step_guard,
            lr_factor=self.recipe.lr_factor,
            checkpoint_extras={},
            replace_optimizer=self.replace_optimizer,
        )
        self.recorder, self.snapshots = Recorder(), Snapshots()

    def fit(self, start: Path | None = None) -> "Harness":
        """Trains; from a checkpoint, if one is given."""
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            precision=self.recipe.precision,
            max_epochs=-1,
            max_steps=self.recipe.max_steps,
            accumulate_grad_batches=self.recipe.accumulate,
            callbacks=[self.step_guard, *self.callbacks, self.snapshots],
            logger=self.recorder,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = TrainBatches(
            TEXT,
            seed=self.seed,
            batch_size=self.recipe.batch_size,
            seq_len=self.recipe.seq_len,
            first=lambda: self.trainer.global_step * self.recipe.accumulate,
        )
        self.trainer.fit(self.task, train_dataloaders=batches, ckpt_path=start, weights_only=True)
        return self

    @property
    def states(self) -> list[dict[str, Any]]:
        return self.snapshots.states


def logged_by(
    callback: pl.Callback, task: pl.LightningModule, data: torch.Tensor
) -> dict[int, dict[str, float]]:
    """What a callback logs in two steps of a trainer that is not ours."""
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=2,
        callbacks=[callback],
        accelerator="cpu",
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(data, batch_size=2))
    return recorder.lines


class Poison(pl.Callback):
    """Makes the loss or one gradient non-finite in given steps, counted from 1.

    The loss by an entry of a weight in the forward pass: that of the last norm, or `at`.
    """

    def __init__(
        self,
        steps: set[int],
        *,
        what: str,
        value: float = float("nan"),
        at: str = "final_norm.weight",
    ) -> None:
        self.steps, self.what, self.value, self.at = steps, what, value, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step + 1 in self.steps and self.what == "loss":
            weight = pl_module.model.get_parameter(self.at)
            self.kept = weight.detach().clone()
            with torch.no_grad():
                weight[0] = self.value

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step + 1 not in self.steps:
            return
        if self.what == "loss":
            # The poison has gone through the graph; the weight itself must not keep it.
            with torch.no_grad():
                pl_module.model.get_parameter(self.at).copy_(self.kept)
        else:
            pl_module.model.embedding.weight.grad[0, 0] = self.value
