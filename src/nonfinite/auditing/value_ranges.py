"""What is known about the values of a tensor for all inputs and weights within a range.

A `Known` holds bounds of all elements, and the few relations between tensors on which the usual
guards rest: a sum of the very values that it divides, a root of their mean square, a maximum that
was subtracted. Everything is a bound on what a computer gives, in the dtype in which it gives it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

INF = math.inf

SLACK = 2.0
"""Factor by which bounds of sums and of functions that are not rounded exactly are widened."""

PEAK_FLOOR = 1e-30
"""Shares below this are not used: they could be rounded to 0."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Bounds of all elements of a tensor, and relations to other tensors."""

    low: float = -INF
    high: float = INF
    why: str = ""
    """Which operation keeps the values above 0; "" if none does."""
    token: int = 0
    """Tensors with the same token hold the same values, up to rounding; 0: unknown."""
    peak: float | None = None
    """The largest element along the last dimension is at least this; None: unknown."""
    square_of: int = 0
    """The token of the values whose squares these are."""
    mean_square_of: tuple[int, float] | None = None
    """Token t and number n: each value is at least t's squares divided by n."""
    root_of: tuple[int, float] | None = None
    """Token t and number n: each value is at least |t| divided by n."""
    inverse_of: tuple[int, float] | None = None
    """Token t and number n: the product with t is at most n."""
    sum_of: int = 0
    """Token of non-negative values none of which is above the value here."""
    max_of: int = 0
    """Token of the values whose maximum along the last dimension this is."""
    condition: tuple[int, str, float] | None = None
    """Of a truth value: it says whether the values of a token are eq, ne, gt, ge, lt or le this."""
    has_data_size: bool = False
    """Whether the number of elements depends on values, and may be 0."""

    @property
    def is_bounded(self) -> bool:
        """Whether both bounds are finite."""
        return self.low > -INF and self.high < INF

    @property
    def size(self) -> float:
        """The largest absolute value that is possible."""
        return max(abs(self.low), abs(self.high))

    @property
    def excludes_zero(self) -> bool:
        """Whether no element can be 0."""
        return self.low > 0 or self.high < 0

    def plain(self) -> "Known":
        """The bounds alone, for values that are related to the others no more."""
        return Known(low=self.low, high=self.high, why=self.why, has_data_size=self.has_data_size)


ANY = Known()
"""Nothing is known, not even that infinities of a mask are absent."""

TRUTH = Known(low=0.0, high=1.0)
"""A truth value as a number."""


def exactly(value: float) -> Known:
    """A constant."""
    return Known(low=value, high=value, why=f"it is {value:.4g}" if value > 0 else "")


def hull(*parts: Known) -> Known:
    """Bounds that hold for the values of each part."""
    whys = {part.why for part in parts}
    return Known(
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
        why=next(iter(whys)) if len(whys) == 1 else "",
        has_data_size=any(part.has_data_size for part in parts),
    )


def rounded(value: float, dtype: torch.dtype) -> float:
    """A bound as the dtype rounds it; rounding keeps the order of numbers, so it stays a bound."""
    if not dtype.is_floating_point or math.isinf(value) or value == 0.0:
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of a dtype."""
    return float(torch.finfo(dtype).max) if dtype.is_floating_point else INF


def product(a: float, b: float) -> float:
    """The product of two bounds, where 0 times infinity is 0."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


def times(a: Known, b: Known) -> Known:
    """Bounds of a product."""
    corners = [product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Known(low=min(corners), high=max(corners))


def plus(a: Known, b: Known, *, alpha: float = 1.0) -> Known:
    """Bounds of a + alpha b."""
    scaled = times(b, exactly(alpha))
    low = -INF if -INF in (a.low, scaled.low) else a.low + scaled.low
    high = INF if INF in (a.high, scaled.high) else a.high + scaled.high
    return Known(low=low, high=high)


def over(a: Known, b: Known) -> Known:
    """Bounds of a / b; none if b may be 0."""
    if not b.excludes_zero:
        return ANY
    inverse = sorted((1.0 / b.low, 1.0 / b.high))
    return times(a, Known(low=inverse[0], high=inverse[1]))


def square(a: Known) -> Known:
    """Bounds of a squared."""
    top = product(a.size, a.size)
    least = 0.0 if a.low <= 0.0 <= a.high else min(abs(a.low), abs(a.high)) ** 2
    return Known(low=least, high=top)


def summed(a: Known, number: float) -> Known:
    """Bounds of a sum of at least one and at most so many terms, with its rounding."""
    low = a.low / SLACK if a.low >= 0 else product(a.low, number) * SLACK
    high = product(a.high, number) * SLACK if a.high > 0 else a.high / SLACK
    if a.low >= 0 and a.peak is not None and a.peak > PEAK_FLOOR:
        low = max(low, a.peak / SLACK)
    return Known(low=low, high=high)


def widened(known: Known, *, smallest: float) -> Known:
    """Bounds of a function that is not rounded exactly, and may give 0 below `smallest`."""
    low = known.low / SLACK if known.low > 0 else known.low * SLACK
    high = known.high * SLACK if known.high > 0 else known.high / SLACK
    return replace(known, low=0.0 if 0 < low < smallest else low, high=high)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation below autograd, with what is known of its operands."""

    name: str
    """Name in torch's native library without overload and trailing underscore."""
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Tensor
    known: Callable[[Any], Known]
    """What is known of an argument: a tensor or a number."""
    rows: int = 1
    """Rows of the batch; another batch may have one alone."""

    def of(self, place: int, name: str = "", default: Any = None) -> Known:
        """What is known of an argument by place or name."""
        return self.known(self.get(place, name, default))

    def get(self, place: int, name: str = "", default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def smallest(self) -> float:
        """The smallest normal number of the result's dtype."""
        dtype = self.result.dtype
        return float(torch.finfo(dtype).smallest_normal) if dtype.is_floating_point else 1.0


Rule = Callable[[Step], Known | None]
"""From the operands of an operation to what is known of its result; None if nothing is."""


def named(rule: Rule, *names: str) -> dict[str, Rule]:
    """The same rule for several operations."""
    return dict.fromkeys(names, rule)
