"""A frozen router bias: a positive control for routers whose bias drifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from src.stability.base import ROUTER, RemedyConfig, Role, RunFacts, check_frac
from src.stability.router_override import RouterOverride

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class RouterFreezeConfig(RemedyConfig):
    """Stops updating the router's balancing bias."""

    role: ClassVar[Role] = "positive_control"

    start_frac: float
    """Fraction of the run before the change; from 0 to 1."""

    def __post_init__(self) -> None:
        check_frac("start_frac", self.start_frac)

    def needs(self) -> tuple[str, ...]:
        return (ROUTER,)

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [RouterOverride("router_freeze", self.start_frac, run, bias_frozen=True)]
