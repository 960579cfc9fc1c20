"""Next-token prediction as a LightningModule.

Axes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from nonfinite.guard import StepGuard
from nonfinite.random_state import host_states, set_host_states
from src.data.batches import Batch
from src.training.loss import cross_entropy, losses
from src.training.optim import build_optimizer
from src.training.recipe import RecipeConfig


class LanguageModelTask(pl.LightningModule):
    """Trains a model on cross-entropy plus whatever weighted losses its parts add.

    Args:
        model: token ids (B, T) to logits (B, T, V); may have the methods that Transformer has:
            extra_losses, finish_batch, finish_step.
        recipe: optimizer, schedule, clipping.
        guard: the step guard that is among the trainer's callbacks.
        lr_factor: factor on the learning rate by optimizer step.
        checkpoint_extras: plain values that every checkpoint carries.
        compiled: put the training step's forward and backward pass through torch.compile.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        recipe: RecipeConfig,
        guard: StepGuard,
        lr_factor: Callable[[int], float],
        checkpoint_extras: dict[str, Any],
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # All that is not a training step, such as validation, takes the model as it is.
        self._losses = torch.compile(losses, dynamic=False) if compiled else losses
        self._extra_losses = getattr(model, "extra_losses", dict)
        self._finish_batch = getattr(model, "finish_batch", _nothing)
        self._finish_step = getattr(model, "finish_step", _nothing)
        self.recipe = recipe
        self.guard = guard
        self.lr_factor = lr_factor
        self.checkpoint_extras = checkpoint_extras
        self.step_losses: dict[str, Tensor] = {}
        self.clip_bound = torch.zeros(())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.model(tokens_BT)

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of each target in nats, (B, T), float32 whatever the precision."""
        tokens_BT, targets_BT = batch
        return cross_entropy(self.model(tokens_BT), targets_BT)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        tokens_BT, targets_BT = batch
        weight = self.recipe.z_loss_weight
        losses = self._losses(self.model, tokens_BT, targets_BT, z_loss_weight=weight)
        losses |= self._extra_losses()
        if batch_idx % self.recipe.accumulate == 0:
            self.step_losses = {}
        for name, loss in losses.items():
            share = loss.detach() / self.recipe.accumulate
            earlier = self.step_losses.get(name)
            self.step_losses[name] = share if earlier is None else earlier + share
        return torch.stack(tuple(losses.values())).sum()

    def on_after_backward(self) -> None:
        """Closes a micro-batch."""
        self._finish_batch()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that the guard has taken, or anew where a remedy came between."""
        bound = self.recipe.clip_norm
        self.clip_bound = torch.zeros(())
        if bound is None or not self.guard.applied:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.guard.current_norm
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
        self.clip_bound = (norm > bound).float()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Forward, backward, guard, clipping and update; then routers balance their load."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.world_size > 1:
            values = torch.stack(tuple(self.step_losses.values()))
            means = self.trainer.strategy.reduce(values, reduce_op="mean")
            self.step_losses = dict(zip(self.step_losses, means.unbind(), strict=True))
        self._finish_step(applied=self.guard.applied)
        # Lightning does it after the next forward pass, whose activations would lie beside them.
        optimizer.zero_grad()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and the schedule."""
        optimizer = build_optimizer(self.model.parameters(), self.recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what makes a checkpoint complete: config, tokenizer, state of the generators."""
        checkpoint.update(self.checkpoint_extras)
        device = self.trainer.strategy.root_device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        own = {"cpu": torch.get_rng_state(), "cuda": cuda, **host_states()}
        checkpoint["rng"] = own
        if self.trainer.world_size > 1:
            everyones: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyones, own)
            checkpoint["rng"], checkpoint["rng_of_other_ranks"] = everyones[0], everyones[1:]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the generators where they were; a rank that was not there stays at its seed."""
        everyones = [checkpoint["rng"], *checkpoint.get("rng_of_other_ranks", [])]
        if self.trainer.global_rank >= len(everyones):
            return
        own = everyones[self.trainer.global_rank]
        # Older checkpoints have torch's alone.
        if "python" in own:
            set_host_states(own)
        torch.set_rng_state(own["cpu"])
        # The module is not there yet.
        device = self.trainer.strategy.root_device
        if device.type == "cuda" and own["cuda"]:
            torch.cuda.set_rng_state(own["cuda"][0], device)


def _nothing(**_: Any) -> None:
    """What a model does that does not ask to be told."""
