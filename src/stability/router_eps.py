"""An epsilon in the gate: a positive control for routers whose scores underflow.

It is known to remove the NaN. It does not remove loss spikes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from src.stability.base import ROUTER, RemedyConfig, Role, RunFacts, check_frac, check_positive
from src.stability.router_override import RouterOverride

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class RouterEpsConfig(RemedyConfig):
    """Adds an epsilon to the gate's denominator, so that 0/0 becomes 0/eps."""

    role: ClassVar[Role] = "positive_control"

    eps: float
    """Added to the sum of the selected scores; above 0."""
    start_frac: float
    """Fraction of the run before the change; from 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_frac("start_frac", self.start_frac)

    def needs(self) -> tuple[str, ...]:
        return (ROUTER,)

    def replaces(self) -> tuple[str, ...]:
        return ("ffn.router.norm_eps",)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [RouterOverride("router_eps", self.start_frac, run, norm_eps=self.eps)]
