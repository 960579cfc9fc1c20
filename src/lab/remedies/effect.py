"""What a remedy does to one failure, and the word for it."""

from dataclasses import dataclass

MIN_HELP = 0.25
"""A remedy does not help if the data show that it undoes less than this share of the damage."""

MAX_FREE = 0.05
"""Nats; a remedy is free if the data show that it costs less than this where nothing is wrong."""

HELPS, HELPS_LITTLE, NO_HELP = "helps", "helps a little", "does not help"
HARMS, FREE, UNKNOWN = "harms", "costs little", "unknown"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a remedy does to a failure."""

    remedy: str
    undone: float
    """The share of the damage that it undoes: 1 as healthy, 0 as untreated, below 0 worse. If
    `is_cost`: the loss minus that of untreated runs, in nats."""
    low: float
    high: float
    """The 95 % interval of `undone`."""
    p_value: float | None
    """Adjusted over the remedies tried on the failure."""
    is_significant: bool
    is_cost: bool
    """Whether nothing is wrong, so that a remedy can only cost something."""
    num_failing: int
    num_runs: int

    @property
    def benefit(self) -> float:
        """The effect with the sign that makes more of it better."""
        return -self.undone if self.is_cost else self.undone

    @property
    def verdict(self) -> str:
        """One of the words above, as far as the data say.

        helps or harms: the effect is significant; it helps a little if its interval rules out that
        it undoes MIN_HELP of the damage. does not help, or costs little: the interval rules out
        more than that.
        """
        if self.is_significant:
            if self.benefit <= 0:
                return HARMS
            return HELPS if self.is_cost or self.high >= MIN_HELP else HELPS_LITTLE
        if self.is_cost:
            return FREE if self.high < MAX_FREE else UNKNOWN
        return NO_HELP if self.high < MIN_HELP else UNKNOWN
