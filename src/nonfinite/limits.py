"""The limits of arithmetic towards which the instruments' figures can drift."""

import functools
import math
import re
from dataclasses import dataclass

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max

SQUARE_LIMIT = math.sqrt(FLOAT32_MAX)
"""Above it a square is infinite in float32; norms and gradient norms are sums of squares."""

UNDERFLOW_LOGIT = -88.72
"""Where float32's sigmoid becomes exactly 0."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What ends a drift of one figure."""

    metric: str
    """A regular expression for the whole name; its groups `layer` and `group` say where."""
    what: str
    """The figure in words."""
    bound: float
    """Where the arithmetic ends."""
    grows: bool
    """Whether the figure drifts by a factor a step, so that its logarithm is followed; else by an
    amount a step."""
    narrows: bool
    """Whether the arithmetic's own largest number is the bound where that is smaller."""
    then: str
    """What happens there."""

    def bound_for(self, float_max: float) -> float:
        """The bound in arithmetic whose largest number this is."""
        return min(self.bound, float_max) if self.narrows else self.bound

    def then_for(self, float_max: float) -> str:
        """What happens there: where the arithmetic's own end is the bound, the figure overflows."""
        return "overflow" if self.narrows and float_max < self.bound else self.then

    def scaled(self, value: float) -> float | None:
        """The figure on the axis on which it drifts evenly; None where it has no place there."""
        if not self.grows:
            return value
        return math.log(abs(value)) if value != 0.0 else None


LIMITS = (
    Limit(
        metric=r"moe/layer_(?P<layer>\d+)/picked_logit_min",
        what="lowest picked gate logit",
        bound=UNDERFLOW_LOGIT,
        grows=False,
        narrows=False,
        then="underflow",
    ),
    Limit(
        metric=r"moe/layer_(?P<layer>\d+)/topk_sum_min",
        what="smallest sum of picked scores",
        bound=torch.finfo(torch.float32).smallest_normal,
        grows=True,
        narrows=False,
        then="0/0",
    ),
    Limit(
        metric=r"attention/layer_(?P<layer>\d+)/max_logit",
        what="largest attention logit",
        bound=FLOAT32_MAX,
        grows=True,
        narrows=True,
        then="overflow",
    ),
    Limit(
        metric=r"act/layer_(?P<layer>\d+)/absmax",
        what="largest activation",
        bound=SQUARE_LIMIT,
        grows=True,
        narrows=True,
        then="overflow of its square",
    ),
    Limit(
        metric=r"act/layer_(?P<layer>\d+)/(|experts_|shared_)rms",
        what="RMS of activations",
        bound=SQUARE_LIMIT,
        grows=True,
        narrows=True,
        then="overflow of its square",
    ),
    Limit(
        metric=r"output/logsumexp",
        what="logsumexp of the output",
        bound=FLOAT32_MAX,
        grows=True,
        narrows=True,
        then="overflow",
    ),
    Limit(
        metric=r"grad/((?P<group>\w+)/)?norm",
        what="gradient norm",
        bound=SQUARE_LIMIT,
        grows=True,
        narrows=False,
        then="overflow of its square",
    ),
    Limit(
        metric=r"adam/(?P<group>\w+)/moment_max",
        what="largest second moment of AdamW",
        bound=FLOAT32_MAX,
        grows=True,
        narrows=False,
        then="overflow",
    ),
)
"""In this order they are looked for; a figure follows the first that fits its name."""


@functools.cache
def limit_of(metric: str) -> tuple[Limit, str] | None:
    """The limit that a metric can run into, and the figure in words; None where there is none."""
    for limit in LIMITS:
        found = re.fullmatch(limit.metric, metric)
        if found is not None:
            places = found.groupdict()
            if places.get("layer") is not None:
                return limit, f"layers.{places['layer']} {limit.what}"
            group = places.get("group")
            return limit, limit.what if group is None else f"{limit.what} in group {group}"
    return None
