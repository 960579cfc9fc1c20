"""What the parts of one model share."""

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
