"""Norms on queries and keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig


@dataclass(kw_only=True)
class QKNormConfig(RemedyConfig):
    """RMSNorm over each query and key head (Dehghani et al., arXiv 2302.05442)."""

    def claims(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"attention.qk_norm": True}
