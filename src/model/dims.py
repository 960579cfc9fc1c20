"""Sizes that the parts of one model share, and their checks."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes that the model passes to its attention and feed-forward parts."""

    hidden_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads a layer."""
    head_dim: int
    """Dimensions of one head."""
    norm_eps: float
    """Epsilon of every RMSNorm."""


MAX_DIM, MAX_LAYERS, MAX_VOCAB = 10**6, 1000, 10**7
"""Larger than any real model. Within them no product of sizes overflows, and counting the
parameters takes seconds at most."""


def check_sizes(config: object, fields: Iterable[str], *, most: int = MAX_DIM) -> None:
    """Raises ValueError if a field's size is above `most`; None is not checked."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value > most:
            raise ValueError(f"{field}={value}: must be at most {most:,}")


def check_rope_dim(rope_dim: int, *, head_dim: int) -> None:
    """Raises ValueError unless `rope_dim` is positive, even and at most head_dim."""
    if rope_dim <= 0 or rope_dim % 2:
        raise ValueError(f"rope_dim={rope_dim}: must be positive and even (a rotation turns pairs)")
    if rope_dim > head_dim:
        raise ValueError(f"rope_dim={rope_dim}: must be at most head_dim={head_dim}")
