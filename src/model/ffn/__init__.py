"""Feed-forward options. A new one: its file here, its YAML in conf/ffn, a line in FEED_FORWARDS."""

from src.model.ffn.base import FeedForward, FeedForwardConfig
from src.model.ffn.mlp import MLPConfig
from src.model.ffn.moe import MoEConfig

FEED_FORWARDS: dict[str, type[FeedForwardConfig]] = {
    "mlp": MLPConfig,
    "moe": MoEConfig,
}

__all__ = ["FEED_FORWARDS", "FeedForward", "FeedForwardConfig"]
