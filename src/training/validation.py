"""Validation: the loss on held-out windows, with the raw weights and with averaged ones."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
import numpy as np
import torch

from nonfinite.lightning.step_callback import StepCallback, log
from src.data.batches import Batch
from src.training.task import LanguageModelTask


class Validation(StepCallback):
    """Evaluates after given steps, and keeps the last and the best metrics of each kind of weights.

    If a callback has a method `evaluation_weights()`, which returns {name: context manager}, the
    model is also evaluated inside each context, and metrics are logged as `val_<name>/`. This is
    how averaged weights are evaluated. Windows with a non-finite loss are counted, never averaged.

    Args:
        batches: the validation windows.
        at_steps: numbers of the steps after which to validate.
        for_others: further steps, whose metrics are logged only for comparison with other runs and
            count neither as last nor as best; 0 is before the first step.
        token_bytes: bytes of each token, (vocabulary,); zeros if unknown.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        *,
        at_steps: set[int],
        for_others: set[int],
        token_bytes: np.ndarray,
    ) -> None:
        self.batches, self.at_steps, self.for_others = batches, at_steps, for_others
        self.token_bytes = torch.from_numpy(token_bytes.astype(np.int64))
        self.last: dict[str, float] = {}
        self.last_step = 0
        self.best: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validates the initial weights, if step 0 is in `for_others`."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and 0 in self.for_others:
            log(trainer, self._metrics(trainer, pl_module), step=0)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Validates if it is due, and when the guard or a remedy ends the run."""
        is_own = step in self.at_steps or trainer.should_stop
        if not is_own and step not in self.for_others:
            return
        metrics = self._metrics(trainer, pl_module)
        if is_own:
            self.last, self.last_step = metrics, step
            self._keep_best(metrics, step)
        log(trainer, metrics, step=step)

    def _keep_best(self, metrics: dict[str, float], step: int) -> None:
        """Keeps the best metrics of each kind of weights, by their own loss.

        Averaged weights are often best at another step than the raw ones. `step` is that of the raw
        weights.
        """
        for prefix in dict.fromkeys(name.partition("/")[0] for name in metrics):
            if _rank(metrics, prefix) >= _rank(self.best, prefix):
                continue
            kept = {k: v for k, v in self.best.items() if not k.startswith(f"{prefix}/")}
            own = {k: v for k, v in metrics.items() if k.startswith(f"{prefix}/")}
            self.best = {**kept, **own, **({"step": step} if prefix == "val" else {})}

    def _metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The metrics of the raw weights and of the weights that callbacks offer."""
        assert isinstance(pl_module, LanguageModelTask)
        metrics: dict[str, float] = {}
        others = {f"val_{name}": context for name, context in offered_weights(trainer).items()}
        for prefix, context in {"val": nullcontext, **others}.items():
            with context():
                values = self._evaluate(trainer, pl_module)
            metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        return metrics

    @torch.no_grad()
    def _evaluate(self, trainer: pl.Trainer, task: LanguageModelTask) -> dict[str, float]:
        """Mean loss and bits per byte of finite windows, and shares that are not finite.

        A NaN reaches all later tokens of its window, so the share of tokens says more than that of
        windows, and unlike a count of training batches it does not depend on the batch size.
        """
        was_training = task.training
        task.eval()
        window_losses, window_bytes, window_nonfinite = [], [], []
        bytes_of_token = self.token_bytes.to(task.device)
        rank, world_size = trainer.global_rank, trainer.world_size
        for index, batch in enumerate(self.batches):
            batch = trainer.strategy.batch_to_device(batch, task.device)
            window_bytes.append(bytes_of_token[batch[1]].sum(dim=1))
            if index % world_size != rank:
                # Another process evaluates this batch; zeros let a sum over ranks combine all.
                window_losses.append(torch.zeros(len(batch[0]), device=task.device))
                window_nonfinite.append(torch.zeros(len(batch[0]), device=task.device))
                continue
            with trainer.precision_plugin.val_step_context():
                token_losses = task.token_losses(batch)
            window_losses.append(token_losses.sum(dim=1))
            window_nonfinite.append((~token_losses.isfinite()).float().mean(dim=1))
        task.train(was_training)
        losses, num_bytes = torch.cat(window_losses), torch.cat(window_bytes)
        nonfinite = torch.cat(window_nonfinite)
        if world_size > 1:
            losses = trainer.strategy.reduce(losses, reduce_op="sum")
            nonfinite = trainer.strategy.reduce(nonfinite, reduce_op="sum")
        finite = losses.isfinite()
        metrics = {
            "nonfinite_frac": 1.0 - finite.float().mean().item(),
            "nonfinite_tokens": nonfinite.double().mean().item(),
        }
        if finite.any():
            total = losses[finite].double().sum().item()
            metrics["loss"] = total / (int(finite.sum()) * batch[1].shape[1])
            total_bytes = int(num_bytes[finite].sum())
            if total_bytes:
                metrics["bits_per_byte"] = total / math.log(2) / total_bytes
        return metrics

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The last and the best metrics."""
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        self.last, self.best = state_dict["last"], state_dict["best"]


def offered_weights(trainer: pl.Trainer) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Contexts inside which the model holds other weights, by name, from all callbacks."""
    offered: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "evaluation_weights"):
            offered |= callback.evaluation_weights()
    return offered


def _rank(metrics: dict[str, float], prefix: str) -> tuple[float, float]:
    """Lower is better; above every validation if there was none yet."""
    loss = metrics.get(f"{prefix}/loss", math.inf)
    return metrics.get(f"{prefix}/nonfinite_frac", math.inf), loss
