"""A soft-cap on the output logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.part_stats import PartStats

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class SoftCapHeadConfig(RemedyConfig):
    """Caps the output logits (Gemma 2, arXiv 2408.00118, section 2).

    z <- cap * tanh(z / cap), with z = head(x) and a cap of 30.

    The tanh is float32 at any precision; its result has the dtype of the logits. Departure: with a
    large vocabulary, the loss is no longer computed in chunks, because these compute the logits
    themselves. It then takes more memory, which the estimate counts.

    Logs the largest logit before the cap (`peak`), and what the cap took from it (`cut`).
    """

    cap: float
    """Bound on a logit; above 0."""

    def __post_init__(self) -> None:
        check_positive("cap", self.cap)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"model.head_softcap": self.cap}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [PartStats("softcap_head", ".model.softcap", run)]
