"""Which instruments look, and how often."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class WatchConfig:
    """Intervals of the instruments in optimizer steps; null leaves one out.

    The watch for spikes is always there: every record states what it saw.
    """

    gradients_every: int | None
    """Gradients, updates and AdamW's moments by group of parameters."""
    activations_every: int | None
    """Activations, attention scores and output."""
    routers_every: int | None
    """Load, bias and gate of every router."""
    incidents: bool
    """Record the first non-finite step, and a large spike."""
    float_max: float | None
    """The largest number of the arithmetic, for early warnings; null: that of recipe.precision."""

    def __post_init__(self) -> None:
        for field in ("gradients_every", "activations_every", "routers_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1, or null for off")
        if self.float_max is not None and not 0 < self.float_max < math.inf:
            raise ValueError(f"float_max={self.float_max}: must be above 0 and finite, or null")


def check_interval(every: Any) -> None:
    """Raises ValueError where an interval is no number of steps."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every}: must be an integer, at least 1")
