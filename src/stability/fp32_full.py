"""Full precision throughout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.stability.base import RemedyConfig


@dataclass(kw_only=True)
class Fp32FullConfig(RemedyConfig):
    """float32 throughout: the YAML of the write-up's option 4."""

    def claims(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See RemedyConfig."""
        return {"recipe.precision": "32-true", "recipe.matmul_precision": "highest"}
