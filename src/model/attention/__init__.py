"""Attention options. A new one: its file here, its YAML in conf/attention, a line in ATTENTIONS."""

from src.model.attention.base import Attention, AttentionConfig
from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig

ATTENTIONS: dict[str, type[AttentionConfig]] = {
    "gqa": GQAConfig,
    "mlha": MLHAConfig,
}

__all__ = ["ATTENTIONS", "Attention", "AttentionConfig"]
