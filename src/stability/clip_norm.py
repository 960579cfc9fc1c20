"""A tighter bound on the norm of the gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig, check_positive


@dataclass(kw_only=True)
class ClipNormConfig(RemedyConfig):
    """A lower clipping norm (Pascanu et al., arXiv 1211.5063); option 1 of the write-up.

    AdamW is nearly invariant to a constant factor on the gradient, so the effect depends on how
    often the bound binds, which grad/clip_frac logs.
    """

    norm: float
    """Largest gradient norm; above 0."""

    def __post_init__(self) -> None:
        check_positive("norm", self.norm)

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.clip_norm": self.norm}
