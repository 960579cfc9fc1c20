"""An epsilon in the gate, known to end the NaN of a router whose scores underflow; spikes stay."""

from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl

from src.stability.base import ROUTER, RemedyConfig, Role, RunFacts, check_frac, check_positive
from src.stability.router_override import RouterOverride


@dataclass(kw_only=True)
class RouterEpsConfig(RemedyConfig):
    """An epsilon in the gate's division from a share of the run on: 0/0 becomes 0/eps."""

    role: ClassVar[Role] = "positive_control"

    eps: float
    """Added to the sum of the picked scores; above 0."""
    start_frac: float
    """Share of the run before it; from 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_frac("start_frac", self.start_frac)

    def needs(self) -> tuple[str, ...]:
        """See RemedyConfig."""
        return (ROUTER,)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [RouterOverride("router_eps", self.start_frac, run, norm_eps=self.eps)]
