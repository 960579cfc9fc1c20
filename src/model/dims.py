"""What the parts of one model share."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes that attention and feed-forward parts take from the model around them."""

    hidden_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads a layer."""
    head_dim: int
    """Dimensions of one head."""
    norm_eps: float
    """Epsilon of every RMSNorm."""


MAX_DIM, MAX_LAYERS, MAX_VOCAB = 10**6, 1000, 10**7
"""Beyond any model; with these no product of sizes overflows, and blocks are counted in seconds."""


def check_sizes(config: object, fields: Iterable[str], *, most: int = MAX_DIM) -> None:
    """Raises ValueError where a size is beyond any model's; None is no size."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value > most:
            raise ValueError(f"{field}={value}: must be at most {most:,}")
