"""Configuration of the instruments' intervals and of the step guard."""

import math
from dataclasses import dataclass
from typing import Any

CHECKS = ("loss", "gradients")
ON_NONFINITE = ("skip", "stop", "raise")
ON_ALARM = ("none", "checkpoint", "stop")


@dataclass(kw_only=True)
class WatchConfig:
    """Intervals of the instruments in optimizer steps; null turns an instrument off.

    The spike watch is always on, because every record contains its results.
    """

    gradients_every: int | None
    """Statistics of gradients, updates and AdamW's moments, by parameter group."""
    activations_every: int | None
    """Statistics of activations, attention scores and output logits."""
    routers_every: int | None
    """Load, bias and gate statistics of every router."""
    incidents: bool
    """Record the first non-finite step, and the first large spike."""
    float_max: float | None
    """Largest finite number, for early warnings; null: that of recipe.precision."""

    def __post_init__(self) -> None:
        for field in ("gradients_every", "activations_every", "routers_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1, or null for off")
        if self.float_max is not None and not 0 < self.float_max < math.inf:
            raise ValueError(f"float_max={self.float_max}: must be above 0 and finite, or null")


def check_interval(every: Any) -> None:
    """Raises ValueError unless an interval is a positive number of steps."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every}: must be an integer, at least 1")


@dataclass(kw_only=True)
class GuardConfig:
    """What happens after a step whose loss or gradient is NaN or infinite."""

    check: list[str]
    """What is checked before the optimizer acts: loss, gradients (the write-up checks only loss).
    If empty, non-finite steps are counted but applied."""
    on_nonfinite: str
    """skip: drop the step and continue; stop: end the run cleanly; raise: end it with an error."""
    max_consecutive: int | None
    """Stop after this many skipped steps in a row; null: never."""
    on_alarm: str
    """After the first early warning: none: nothing; checkpoint: keep the state to branch from;
    stop: end the run."""

    def __post_init__(self) -> None:
        is_list = isinstance(self.check, list | tuple)
        if not is_list or any(entry not in CHECKS for entry in self.check):
            raise ValueError(
                f"check={self.check}: must be a list that may hold {', '.join(CHECKS)}"
            )
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(
                f"on_nonfinite={self.on_nonfinite}: must be one of {', '.join(ON_NONFINITE)}"
            )
        if self.on_alarm not in ON_ALARM:
            raise ValueError(f"on_alarm={self.on_alarm}: must be one of {', '.join(ON_ALARM)}")
        if self.max_consecutive is not None and self.max_consecutive < 1:
            raise ValueError(
                f"max_consecutive={self.max_consecutive}: must be at least 1, or null for never"
            )
