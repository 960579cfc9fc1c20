"""The names under which a model's parts are registered."""

from collections.abc import Mapping
from dataclasses import dataclass

from src.common.read_checkpoint import EXTERNAL
from src.model.attention import ATTENTIONS, AttentionConfig
from src.model.ffn import FEED_FORWARDS, FeedForwardConfig


@dataclass(kw_only=True)
class ExternalPart:
    """Attention or feed-forward part of a model that is not ours: nothing to be chosen here."""

    def resolved(self, *, max_steps: int) -> "ExternalPart":
        """Itself; nothing in it hangs on the length of the run."""
        return self


def kinds_of(
    attention: AttentionConfig | ExternalPart, ffn: FeedForwardConfig | ExternalPart
) -> dict[str, str]:
    """Of attention and ffn; several options may be of one kind."""
    return {"attention": _name(attention, ATTENTIONS), "ffn": _name(ffn, FEED_FORWARDS)}


def _name(config: object, registry: Mapping[str, type]) -> str:
    known = {**registry, EXTERNAL: ExternalPart}
    return next(name for name, kind in known.items() if kind is type(config))
