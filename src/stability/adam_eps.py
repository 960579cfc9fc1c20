"""A different epsilon of AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class AdamEpsConfig(RemedyConfig):
    """Sets AdamW's epsilon in w -= rate * m / (sqrt(v) + eps).

    Gradients get smaller as models grow. Once the root mean square of a gradient is near epsilon,
    updates get smaller too, and the loss rises; 1e-15 in place of 1e-8 removes this (Wortsman et
    al., arXiv 2309.14322, section 3.4). OLMo 2 (arXiv 2501.00656, section 3) lowered it from 1e-5
    to 1e-8, after which embeddings trained faster and the gradient norm settled. A large epsilon
    damps the entries with a small second moment instead.

    No departure: the value is that of every parameter group. `adam/<group>/small_frac` says how
    many entries are near it.
    """

    eps: float
    """Above 0 and below 1; usually 1e-15 to 1e-5."""

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: must be above 0 and below 1")

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.eps": self.eps}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        def read(trainer: pl.Trainer, module: pl.LightningModule) -> float:
            return float(trainer.optimizers[0].param_groups[0]["eps"])

        return [EffectMetric("adam_eps_value", read, run)]
