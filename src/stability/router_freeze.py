"""A bias that stays, known to work on a router whose bias drifts."""

from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl

from src.stability.base import ROUTER, RemedyConfig, Role, RunFacts, check_frac
from src.stability.router_override import RouterOverride


@dataclass(kw_only=True)
class RouterFreezeConfig(RemedyConfig):
    """The router's bias stays where it is from a share of the run on."""

    role: ClassVar[Role] = "positive_control"

    start_frac: float
    """Share of the run before it; from 0 to 1."""

    def __post_init__(self) -> None:
        check_frac("start_frac", self.start_frac)

    def needs(self) -> tuple[str, ...]:
        """See RemedyConfig."""
        return (ROUTER,)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [RouterOverride("router_freeze", self.start_frac, run, bias_frozen=True)]
