"""Soft-clamped momentum updates of a router's balancing bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from src.stability.balancing_router import check_balancing_bias
from src.stability.base import ROUTER, RemedyConfig, RunFacts, check_positive
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class RouterSmebuConfig(RemedyConfig):
    """SMEBU, the balancing of Trinity Large (arXiv 2602.17004).

    With the loads c of the experts in a step:

        v = (mean(c) - c) / mean(c)
        d = rate * tanh(scale * v);  d <- d - mean(d)
        m <- momentum * m + (1 - momentum) * d
        b <- b + m

    Trinity Large has rate 5e-4, scale 2 and momentum 0.5.

    Departures: rate=null takes the router's own `bias_rate`, so that the arm differs from its
    baseline by the rule and not by the rate. The update comes when the router's own would come,
    after steps or batches (`ffn.router.update_on`), and replaces `bias_rule` and `bias_target`. In
    Trinity the bias only selects; here it is used as `ffn.router.bias_use` says.

    Logs the largest change of a bias in the last update (`step`, 0 if all loads are equal).
    """

    rate: float | None
    """Largest change of a bias before centring; above 0; null: the router's bias_rate."""
    scale: float
    """How fast the change grows with the imbalance; above 0."""
    momentum: float
    """Weight of the past in each update; from 0 to below 1."""

    def __post_init__(self) -> None:
        if self.rate is not None:
            check_positive("rate", self.rate)
        check_positive("scale", self.scale)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be at least 0 and below 1")

    def needs(self) -> tuple[str, ...]:
        return (ROUTER,)

    def replaces(self) -> tuple[str, ...]:
        return ("ffn.router.bias_rule", "ffn.router.bias_target")

    def check(self, parts: Mapping[str, Any]) -> None:
        check_balancing_bias("router_smebu", parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [RouterSmebu(self, run)]


class SmebuRule:
    """The rule of one router, with its momentum."""

    def __init__(self, config: RouterSmebuConfig, *, rate: float, momentum_E: Tensor) -> None:
        self.config, self.rate, self.momentum_E = config, rate, momentum_E

    @torch.no_grad()
    def __call__(self, counts_E: Tensor) -> Tensor:
        """The change of the bias, (E,), from the number of tokens of each expert."""
        loads_E = counts_E.float()
        # Without any token nothing is out of balance: 0 / 1 instead of 0 / 0.
        violation_E = (loads_E.mean() - loads_E) / loads_E.mean().clamp(min=1e-9)
        change_E = self.rate * torch.tanh(self.config.scale * violation_E)
        change_E -= change_E.mean()
        self.momentum_E.lerp_(change_E, 1 - self.config.momentum)
        return self.momentum_E


class RouterSmebu(RemedyCallback):
    """Puts a rule into each router, and keeps the momenta in checkpoints."""

    def __init__(self, config: RouterSmebuConfig, run: RunFacts) -> None:
        self.config, self.run = config, run
        self.rules: dict[str, SmebuRule] = {}
        self._restored: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for path, module in pl_module.named_modules():
            if hasattr(module, "bias_step"):
                router = cast(Any, module)
                momentum_E = torch.zeros_like(router.bias_E.detach(), dtype=torch.float32)
                if path in self._restored:
                    momentum_E.copy_(self._restored[path])
                own = self.config.rate
                rate = router.config.bias_rate if own is None else own
                self.rules[path] = SmebuRule(self.config, rate=rate, momentum_E=momentum_E)
                router.bias_step = self.rules[path]

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if self.rules and self.is_log_step(trainer, step):
            sizes = [rule.momentum_E.abs().max() for rule in self.rules.values()]
            self.log_at(trainer, step, {"stability/router_smebu_step": float(max(sizes))})

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": {path: rule.momentum_E for path, rule in self.rules.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["momenta"]
