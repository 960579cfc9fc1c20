"""Norms on the latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from src.stability.base import RemedyConfig, RunFacts
from src.stability.figure import Figure, count_norms


@dataclass(kw_only=True)
class LatentNormConfig(RemedyConfig):
    """RMSNorm on the latents of mlha, as DeepSeek-V2 has (arXiv 2405.04434)."""

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"attention.latent_norm": True}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        names = "q_latent_norm", "kv_latent_norm"
        return [Figure("latent_norm_modules", lambda _, m: count_norms(m, *names), run)]
