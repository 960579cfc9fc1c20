"""A different decay of AdamW's second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class Beta2Config(RemedyConfig):
    """Sets AdamW's beta2, to which loss spikes late in training are sensitive."""

    beta2: float
    """From 0 to below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2}: must be at least 0 and below 1")

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.betas": [parts["recipe"].betas[0], self.beta2]}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        def read(trainer: pl.Trainer, module: pl.LightningModule) -> float:
            return float(trainer.optimizers[0].param_groups[0]["betas"][1])

        return [EffectMetric("beta2_value", read, run)]
