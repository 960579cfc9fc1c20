"""Full precision throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from src.stability.base import RemedyConfig, RunFacts
from src.stability.effect_metric import EffectMetric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class Fp32FullConfig(RemedyConfig):
    """float32 throughout, as the YAML of the write-up's option 4 says."""

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe.precision": "32-true", "recipe.matmul_precision": "highest"}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        def read(trainer: pl.Trainer, module: pl.LightningModule) -> float:
            exact = torch.get_float32_matmul_precision() == "highest"
            return float(exact and trainer.precision == "32-true")

        return [EffectMetric("fp32_full_active", read, run)]
