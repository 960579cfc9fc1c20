"""A tighter bound on the norm of the gradient."""

from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig


@dataclass(kw_only=True)
class ClipNormConfig(RemedyConfig):
    """Clips the gradient norm lower (Pascanu et al., arXiv 1211.5063); the write-up's option 1.

    AdamW is nearly invariant to a constant factor on the gradient, so what counts is how often the
    bound binds: see grad/clip_frac.
    """

    norm: float
    """The bound; above 0."""

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise ValueError(f"norm={self.norm}: must be above 0")

    def claims(self) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.clip_norm": self.norm}
