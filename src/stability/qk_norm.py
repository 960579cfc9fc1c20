"""Normalised queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric, count_norms

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class QKNormConfig(RemedyConfig):
    """RMSNorm over each query and key head (Dehghani et al., arXiv 2302.05442)."""

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.qk_norm": True}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [
            EffectMetric("qk_norm_modules", lambda _, m: count_norms(m, "q_norm", "k_norm"), run)
        ]
