"""Full precision throughout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from src.stability.base import RemedyConfig, RunFacts
from src.stability.figure import Figure


@dataclass(kw_only=True)
class Fp32FullConfig(RemedyConfig):
    """float32 throughout: the YAML of the write-up's option 4."""

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.precision": "32-true", "recipe.matmul_precision": "highest"}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""

        def read(trainer: pl.Trainer, module: pl.LightningModule) -> float:
            exact = torch.get_float32_matmul_precision() == "highest"
            return float(exact and trainer.precision == "32-true")

        return [Figure("fp32_full_active", read, run)]
