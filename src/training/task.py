"""Next-token prediction as a LightningModule, and its optimizer.

Axes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from nonfinite.lightning.guard import StepGuard
from nonfinite.snapshot import host_states, set_host_states
from nonfinite.update_check import total_norm
from src.data.batches import Batch
from src.training.loss import compiled_losses, cross_entropy, losses
from src.training.recipe import RecipeConfig


class LanguageModelTask(pl.LightningModule):
    """Trains a model on cross-entropy plus the weighted losses that its parts add.

    Args:
        model: maps token ids (B, T) to logits (B, T, V). If it has extra_losses, finish_batch or
            finish_step, they are called as for Transformer.
        recipe: optimizer, schedule and clipping.
        guard: the step guard, which must also be one of the trainer's callbacks.
        lr_factor: factor on the learning rate, by optimizer step.
        checkpoint_extras: plain values that are added to every checkpoint.
        replace_optimizer: returns the optimizer to train the model with, given AdamW and the model.
        compiled: compile the blocks and the loss of the training step with torch.compile.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        recipe: RecipeConfig,
        guard: StepGuard,
        lr_factor: Callable[[int], float],
        checkpoint_extras: dict[str, Any],
        replace_optimizer: Callable[
            [torch.optim.Optimizer, nn.Module], torch.optim.Optimizer
        ] = lambda optimizer, _: optimizer,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Only the training step is compiled; validation calls the model directly.
        self._losses = compiled_losses(model) if compiled else losses
        self._extra_losses = getattr(model, "extra_losses", dict)
        self._finish_batch = getattr(model, "finish_batch", _do_nothing)
        self._finish_step = getattr(model, "finish_step", _do_nothing)
        self.recipe = recipe
        self.guard = guard
        self.lr_factor = lr_factor
        self.replace_optimizer = replace_optimizer
        self.checkpoint_extras = checkpoint_extras
        self.step_losses: dict[str, Tensor] = {}
        self.clip_bound = torch.zeros(())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.model(tokens_BT)

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of each target in nats, (B, T), float32 at any precision."""
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
        """Lets routers finish the micro-batch."""
        self._finish_batch()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the guard's norm, or by a new one if a remedy has changed the gradients."""
        bound = self.recipe.clip_norm
        self.clip_bound = torch.zeros(())
        if bound is None or not self.guard.applied:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.guard.current_norm
        if norm is None:
            norm = total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
        self.clip_bound = (norm > bound).float()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Forward, backward, guard, clipping and update; then routers update their biases."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.world_size > 1:
            values = torch.stack(tuple(self.step_losses.values()))
            means = self.trainer.strategy.reduce(values, reduce_op="mean")
            self.step_losses = dict(zip(self.step_losses, means.unbind(), strict=True))
        self._finish_step(applied=self.guard.applied)
        # Lightning frees gradients only after the next forward pass, when activations need memory.
        optimizer.zero_grad()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, or what a remedy puts in its place, with the recipe's schedule."""
        adamw = build_optimizer(self.model.parameters(), self.recipe)
        optimizer = self.replace_optimizer(adamw, self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the config, the tokenizer and the states of all random generators."""
        checkpoint.update(self.checkpoint_extras)
        device = self.trainer.strategy.root_device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        own = {"cpu": torch.get_rng_state(), "cuda": cuda, **host_states()}
        checkpoint["rng"] = own
        if self.trainer.world_size > 1:
            states: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, own)
            checkpoint["rng"], checkpoint["rng_of_other_ranks"] = states[0], states[1:]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the random generators; a rank that the checkpoint lacks keeps its seed."""
        states = [checkpoint["rng"], *checkpoint.get("rng_of_other_ranks", [])]
        if self.trainer.global_rank >= len(states):
            return
        own = states[self.trainer.global_rank]
        # Checkpoints of earlier versions hold torch's states only.
        if "python" in own:
            set_host_states(own)
        torch.set_rng_state(own["cpu"])
        # The module has not been moved to its device yet.
        device = self.trainer.strategy.root_device
        if device.type == "cuda" and own["cuda"]:
            torch.cuda.set_rng_state(own["cuda"][0], device)


def _do_nothing(**_: Any) -> None:
    """Stands for a method that the model does not have."""


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, weight_decay: float, decay_params: str
) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one of two groups: with and without weight decay."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [p for p in trainable if decay_params == "all" or p.dim() >= 2]
    spared = [p for p in trainable if decay_params != "all" and p.dim() < 2]
    groups = (decayed, weight_decay), (spared, 0.0)
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(parameters: Iterable[nn.Parameter], recipe: RecipeConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""
    groups = parameter_groups(
        parameters, weight_decay=recipe.weight_decay, decay_params=recipe.decay_params
    )
    betas = recipe.betas[0], recipe.betas[1]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=recipe.fused
    )
