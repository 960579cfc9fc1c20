"""Stability options. A new one: its file here, its YAML in conf/stability, a line in REMEDIES."""

from src.stability.base import RemedyConfig, RunFacts
from src.stability.clip_norm import ClipNormConfig
from src.stability.ema import EmaConfig

REMEDIES: dict[str, type[RemedyConfig]] = {
    "clip03": ClipNormConfig,
    "ema": EmaConfig,
}

__all__ = ["REMEDIES", "RemedyConfig", "RunFacts"]
