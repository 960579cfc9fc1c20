"""A soft-cap on the router's logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.part_stats import PartStats

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class SoftCapRouterConfig(RemedyConfig):
    """Caps the logits that enter the router's sigmoid.

    z <- cap * tanh(z / cap), so that every score is at least sigmoid(-cap). In float32 the sigmoid
    of a number below -88.7 is 0, and a sum of such scores divides 0 by 0; with a cap of 30 the
    smallest score is 1e-13.

    Laguna's router has this cap, before a sigmoid as here; the rule is Gemma 2's (arXiv 2408.00118,
    section 2), which caps attention scores and output logits. Departure: where a router's balancing
    bias changes its logits (`bias_use=multiply` or `add`; in Laguna it only selects), the cap comes
    after the bias, because that is what underflows. Far beyond the cap the gradient of a logit is
    0, so that the router can no longer return.

    Logs the largest logit before the cap (`peak`), and what the cap took from it (`cut`).
    """

    cap: float
    """Bound on a logit; above 0 and below 88.7."""

    def __post_init__(self) -> None:
        check_positive("cap", self.cap)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn.router.softcap": self.cap}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [PartStats("softcap_router", ".router.softcap", run)]
