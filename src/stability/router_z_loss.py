"""A z-loss on the router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class RouterZLossConfig(RemedyConfig):
    """Penalises the squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""

    weight: float
    """Weight of the term in the loss; above 0."""

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn.router.z_loss_weight": self.weight}
