"""A tighter bound on the norm of the gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class ClipNormConfig(RemedyConfig):
    """Clips the gradient norm lower (Pascanu et al., arXiv 1211.5063); the write-up's option 1.

    AdamW is nearly invariant to a constant factor on the gradient, so what counts is how often the
    bound binds: see grad/clip_frac.
    """

    norm: float
    """The bound; above 0."""

    def __post_init__(self) -> None:
        check_positive("norm", self.norm)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.clip_norm": self.norm}
