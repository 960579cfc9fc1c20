"""A soft-cap on the attention scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.part_stats import PartStats

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class SoftCapAttentionConfig(RemedyConfig):
    """Caps attention scores before the mask and the softmax (Gemma 2, arXiv 2408.00118, section 2).

    s <- cap * tanh(s / cap), with s = q . k / sqrt(head_dim) and a cap of 50.

    Departure: Gemma 2 scales the scores by a constant of its own (`query_pre_attn_scalar`), here it
    is 1 / sqrt(head_dim) as without the remedy. Scores, cap and softmax are float32 at any
    precision; in Gemma's public code the cap is computed in the model's dtype.

    Logs the largest score before the cap (`peak`), and what the cap took from it (`cut`): while
    scores are small, `cut` is almost 0, and the remedy does almost nothing.
    """

    cap: float
    """Bound on a score; above 0."""

    def __post_init__(self) -> None:
        check_positive("cap", self.cap)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.softcap": self.cap}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [PartStats("softcap_attention", ".attention.softcap", run)]
