"""A balancing bias whose mean stays 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.balancing_router import check_balancing_bias
from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn


@dataclass(kw_only=True)
class RouterCenterConfig(RemedyConfig):
    """Takes the mean out of the router's balancing bias (torchtitan, issue 1506).

    b <- b + u * (s - mean(s)), s = sign(mean load - load), with u the router's own `bias_rate`.

    torchtitan centres each change s, here the whole bias is centred after each update. Both are the
    same for a bias that starts at 0 and that only balancing changes. Departure: of a bias that the
    optimizer trains too, the mean that training adds is taken out as well. The router keeps its own
    rule for s, which may be proportional (`ffn.router.bias_rule`).

    Logs the size of the mean that the last update took out (`removed`, the largest of all routers).
    """

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn.router.bias_center": True}

    def check(self, parts: Mapping[str, Any]) -> None:
        check_balancing_bias("router_center", parts)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [EffectMetric("router_center_removed", lambda _, task: _largest_mean(task), run)]


def _largest_mean(task: nn.Module) -> float:
    means = [getattr(module, "removed_mean", None) for module in task.modules()]
    return max((abs(float(mean)) for mean in means if mean is not None), default=0.0)
