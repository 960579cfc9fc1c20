"""Norms on the latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig


@dataclass(kw_only=True)
class LatentNormConfig(RemedyConfig):
    """RMSNorm on the latents of mlha, as DeepSeek-V2 has (arXiv 2405.04434)."""

    def claims(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"attention.latent_norm": True}
