"""Limits of the arithmetic towards which the instruments' metrics can drift."""

import functools
import math
import re
from dataclasses import dataclass

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max

SQUARE_LIMIT = math.sqrt(FLOAT32_MAX)
"""Above this value a square overflows in float32; norms are sums of squares."""

UNDERFLOW_LOGIT = -88.72
"""Below this logit, float32's sigmoid is exactly 0."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The limit of one metric."""

    metric: str
    """A regular expression for the metric's whole name; groups `layer` and `group` say where."""
    what: str
    """The metric in words."""
    bound: float
    """The value at which the arithmetic fails."""
    grows: bool
    """Whether the metric drifts by a factor per step, so that its logarithm is followed; else it
    drifts by an amount per step."""
    narrows: bool
    """Whether the bound is lowered to the largest finite number, if that is smaller."""
    then: str
    """What happens at the bound."""

    def bound_for(self, float_max: float) -> float:
        """The bound in arithmetic with this largest finite number."""
        return min(self.bound, float_max) if self.narrows else self.bound

    def then_for(self, float_max: float) -> str:
        """What happens at `bound_for(float_max)`."""
        return "overflow" if self.narrows and float_max < self.bound else self.then

    def scaled(self, value: float) -> float | None:
        """The value on the scale on which it drifts linearly; None for the logarithm of 0."""
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
"""The first limit whose expression matches a metric's name applies to it."""


@functools.cache
def limit_of(metric: str) -> tuple[Limit, str] | None:
    """The limit of a metric, and the metric in words; None if it has no limit."""
    for limit in LIMITS:
        found = re.fullmatch(limit.metric, metric)
        if found is not None:
            places = found.groupdict()
            if places.get("layer") is not None:
                return limit, f"layers.{places['layer']} {limit.what}"
            group = places.get("group")
            return limit, limit.what if group is None else f"{limit.what} in group {group}"
    return None
