"""A z-loss on the output logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class ZLossConfig(RemedyConfig):
    """Penalises the squared log-sum-exp of the logits (PaLM, arXiv 2204.02311, section 5).

    In bf16-mixed the gradient of the logits is bfloat16, with a relative resolution of 0.4 %. While
    the log-sum-exp is small, a weight of 1e-4 adds less than that, so that the term may take effect
    in some steps only.
    """

    weight: float
    """Weight of the term in the loss; above 0."""

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.z_loss_weight": self.weight}
