"""A loss on the log-partition of the gate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class RouterZLossConfig(RemedyConfig):
    """A loss on the squared log-partition of the gate (ST-MoE, arXiv 2202.08906, eq. 5)."""

    weight: float
    """Of the loss; above 0."""

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"ffn.router.z_loss_weight": self.weight}
