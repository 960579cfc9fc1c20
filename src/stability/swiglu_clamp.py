"""Bounds on the two factors of a SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.part_stats import PartStats

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class SwiGLUClampConfig(RemedyConfig):
    """Bounds gate and up of every SwiGLU, as DeepSeek-V4 and gpt-oss do.

    gate <- min(gate, L), up <- clamp(up, -L, L), output = down(silu(gate) * up). A dense layer,
    shared experts and routed experts are all bound.

    This is DeepSeek-V4's form, whose L is 10. Departure from gpt-oss, whose L is 7: that model also
    computes `gate * sigmoid(1.702 * gate) * (up + 1)`; here the function within the bounds stays
    that of the baseline.

    An entry beyond a bound gets no gradient. An infinite entry becomes L, so that the step guard
    does not see such an overflow; NaN stays NaN. Logs the share of entries that were beyond a bound
    (`frac`, of the layer with the largest share); while it is 0, training is that of the baseline.
    """

    limit: float
    """The bound L; above 0."""

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn.swiglu_limit": self.limit}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [PartStats("swiglu_clamp", ".clamp", run)]
