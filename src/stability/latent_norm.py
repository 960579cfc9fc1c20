"""Normalised latents in mlha attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric, count_norms

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class LatentNormConfig(RemedyConfig):
    """RMSNorm on the latents of mlha, as in DeepSeek-V2 (arXiv 2405.04434)."""

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.latent_norm": True}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        names = "q_latent_norm", "kv_latent_norm"
        return [EffectMetric("latent_norm_modules", lambda _, m: count_norms(m, *names), run)]
