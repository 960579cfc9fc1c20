"""A lower rate for tensors whose second moment lags behind their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from src.stability.adam_state import adam_states, require_adam
from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.remedy_callback import RemedyCallback, refuse_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

SMALLEST = 1e-38
"""The least divisor: the square of a small epsilon would be 0 in float32."""


@dataclass(kw_only=True)
class StableAdamWConfig(RemedyConfig):
    """Update clipping: StableAdamW (Wortsman et al., arXiv 2304.13013, section 3.5, algorithm 2).

    For each tensor, after the moments were updated with its gradient g:

        RMS  = sqrt(mean(g^2 / max(v, eps^2)))        v: the bias-corrected second moment
        rate = schedule's rate / max(1, RMS)          for the update and for its weight decay

    RMS is near 1 while v follows g^2. It is large where g has grown faster than v: such an update
    would be too large.

    Departures: the paper uses this instead of clipping the gradient norm. Here recipe.clip_norm
    stays on, and g is the clipped gradient; type recipe.clip_norm=null for the paper's form. The
    bound on RMS, 1 in the paper, is a field.
    """

    max_rms: float
    """Largest RMS at which the rate stays as it is; above 0, 1 in the paper."""

    def __post_init__(self) -> None:
        check_positive("max_rms", self.max_rms)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [UpdateClipping(self, run)]


class UpdateClipping(RemedyCallback):
    """Takes back a part of AdamW's update, after the optimizer's own step.

    The update and the weight decay are both proportional to the rate, so w_old + (w_new - w_old) /
    RMS is what the optimizer would have computed at the lower rate. This works with every optimizer
    that keeps moments as AdamW does; tensors that another rule updates stay as they are. A step
    holds a copy of the weights for it.

    Logs the largest RMS of a step, and how many updates of tensors were scaled so far. Nothing else
    is kept between steps, so that a non-finite step leaves no trace.
    """

    def __init__(self, config: StableAdamWConfig, run: RunFacts) -> None:
        self.config, self.run = config, run
        self.num_scaled = torch.zeros((), dtype=torch.long)
        self.rms_max = torch.zeros(())
        self._before: dict[nn.Parameter, Tensor] = {}
        self._hook: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds a hook to the optimizer, because norm clipping acts after the last callback."""
        super().on_train_start(trainer, pl_module)
        refuse_sharded(trainer, "stable_adamw")
        self._hook = trainer.optimizers[0].register_step_post_hook(self._after_update)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = {p: p.detach().clone() for p in params if p.grad is not None}

    @torch.no_grad()
    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before, self._before = self._before, {}
        require_adam(optimizer, "stable_adamw")
        states, values = adam_states(optimizer), []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter not in states or parameter not in before:
                    continue
                rms = _rms(parameter.grad, states[parameter], group)
                # Not above 1, and 1 where the RMS is not a number: then lerp returns the new value.
                share = (self.config.max_rms / rms).nan_to_num(nan=1.0).clamp(max=1.0)
                parameter.copy_(before[parameter].lerp(parameter, share.to(parameter.dtype)))
                values.append(rms)
        if values:
            all_rms = torch.stack(values)
            self.rms_max = all_rms.max()
            count = (all_rms > self.config.max_rms).sum()
            self.num_scaled = self.num_scaled.to(count.device) + count

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if self.is_log_step(trainer, step):
            metrics = {
                "stability/stable_adamw_scaled": float(self.num_scaled),
                "stability/stable_adamw_rms_max": float(self.rms_max),
            }
            self.log_at(trainer, step, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"num_scaled": self.num_scaled, "rms_max": self.rms_max}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_scaled, self.rms_max = state_dict["num_scaled"], state_dict["rms_max"]


def _rms(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The RMS of a tensor, in float32."""
    moment = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** state["step"])
    floor = max(group["eps"] ** 2, SMALLEST)
    return (gradient.float().square() / moment.clamp(min=floor)).mean().sqrt()
