"""A loss on the log-partition of the output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class ZLossConfig(RemedyConfig):
    """A loss on the squared log-partition of the output (PaLM, arXiv 2204.02311, section 5).

    In bf16-mixed the logits' gradient is bfloat16, whose steps of 0.4 % are coarser than what a
    weight of 1e-4 adds while the log-partition is small: there it may act in some steps only.
    """

    weight: float
    """Of the loss; above 0."""

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.z_loss_weight": self.weight}
