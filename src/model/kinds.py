"""The names under which a model's parts are registered."""

from collections.abc import Mapping

from src.model.attention import ATTENTIONS, AttentionConfig
from src.model.ffn import FEED_FORWARDS, FeedForwardConfig


def kinds_of(attention: AttentionConfig, ffn: FeedForwardConfig) -> dict[str, str]:
    """Of attention and ffn; several options may be of one kind."""
    return {"attention": _name(attention, ATTENTIONS), "ffn": _name(ffn, FEED_FORWARDS)}


def _name(config: object, registry: Mapping[str, type]) -> str:
    return next(name for name, known in registry.items() if known is type(config))
