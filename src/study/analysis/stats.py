"""Statistics of seeds: intervals, Fisher and Holm, and what a design can reach at all.

What scipy has is taken from it. The test of paired values stands in permutation.py.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

from src.study.analysis.results import Estimate, Proportion

ALPHA = 0.05
"""At or below which an adjusted p is called a finding."""

POWER = 0.8

Name = TypeVar("Name", bound=Hashable)


def interval(values: Sequence[float]) -> Estimate | None:
    """Mean with Student's 95 % interval; None without values."""
    if not values:
        return None
    number, mean = len(values), math.fsum(values) / len(values)
    half = 0.0
    if number > 1:
        half = _student_quantile(number - 1) * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Estimate(mean=mean, low=mean - half, high=mean + half, num_seeds=number)


@cache
def _student_quantile(df: int) -> float:
    return float(stats.t.ppf(1 - ALPHA / 2, df))


def share_difference(arm: Proportion, baseline: Proportion) -> Estimate | None:
    """Difference of two shares with Newcombe's 95 % interval, of Wilson's for each; None without.

    It stays wide where all seeds agree, as 0 of 6 against 6 of 6, where an interval over the
    seeds' differences has no width. Newcombe 1998, method 10; the pairing is not used, as in
    Fisher's test.
    """
    if arm.total == 0 or baseline.total == 0:
        return None
    one, two = arm.events / arm.total, baseline.events / baseline.total
    one_low, one_high = _wilson(arm)
    two_low, two_high = _wilson(baseline)
    difference = one - two
    return Estimate(
        mean=difference,
        low=max(-1.0, difference - math.hypot(one - one_low, two_high - two)),
        high=min(1.0, difference + math.hypot(one_high - one, two - two_low)),
        num_seeds=arm.total,
    )


@cache
def _wilson(share: Proportion) -> tuple[float, float]:
    ends = stats.binomtest(share.events, share.total).proportion_ci(1 - ALPHA, method="wilson")
    return float(ends.low), float(ends.high)


@cache
def fisher(arm: Proportion, baseline: Proportion) -> float:
    """Two-sided p of Fisher's exact test; 1 where a side is empty."""
    table = [
        [arm.events, arm.total - arm.events],
        [baseline.events, baseline.total - baseline.events],
    ]
    return float(stats.fisher_exact(table).pvalue)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p (1979): the smallest times their number, the next times one less, ..."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def smallest_fisher_p(num_seeds: int) -> float:
    """All seeds against none, before Holm."""
    return fisher(
        Proportion(events=0, total=num_seeds), Proportion(events=num_seeds, total=num_seeds)
    )


@cache
def smallest_share(
    baseline: Proportion, *, num_seeds: int, others: tuple[float, ...] = ()
) -> float | None:
    """The smallest fall in the share of seeds that Fisher's test finds significant after Holm.

    Holm's correction is step-down: an arm pays only for the arms whose p is not smaller than its
    own. So the answer depends on what the other arms have shown. Multiplying by the number of arms
    (Bonferroni) would claim too little wherever another arm is significant.

    Args:
        baseline: what was observed there.
        num_seeds: of the arm.
        others: p values, before Holm, of the other arms of the family.

    Returns:
        A magnitude above 0, or None where even an arm without any event would not be significant.
    """
    if num_seeds == 0 or baseline.total == 0:
        return None
    share = baseline.events / baseline.total
    for events in range(num_seeds, -1, -1):
        fall = share - events / num_seeds
        p_value = fisher(Proportion(events=events, total=num_seeds), baseline)
        family = dict(enumerate((p_value, *others)))
        if fall > 0 and holm(family)[0] <= ALPHA:
            return fall
    return None


@cache
def smallest_standardized_effect(num_seeds: int) -> float | None:
    """Mean over deviation of paired differences that a t test finds 8 times of 10.

    Two-sided at 5 %, one arm; by the non-central t distribution, without the tail that lies on the
    wrong side. None below two seeds.
    """
    if num_seeds < 2:
        return None
    df, root = num_seeds - 1, math.sqrt(num_seeds)
    bound = _student_quantile(df)

    def missing(effect: float) -> float:
        return float(stats.nct.sf(bound, df, effect * root)) - POWER

    highest = 1.0
    while missing(highest) < 0:
        highest *= 2
    return float(optimize.brentq(missing, 0.0, highest))


def smallest_mean_effect(differences: Sequence[float]) -> float | None:
    """The same in the units of the differences, by their own deviation; None where that is 0."""
    if len(differences) < 2:
        return None
    deviation = float(np.std(differences, ddof=1))
    effect = smallest_standardized_effect(len(differences))
    return None if effect is None or deviation == 0 else effect * deviation


def lr_sensitivity(losses: Mapping[float, float | None], *, initial_loss: float) -> float | None:
    """How much of the loss hangs on the learning rate (arXiv 2309.14322).

    Mean over the rates of min(loss, initial loss), minus the best of them.

    Args:
        losses: final loss by rate, on a grid that is even in the logarithm; None or not finite
            for a run that diverged, which counts as the initial loss.
        initial_loss: that of the untrained model.

    Returns:
        In nats a token; None without rates.

    Raises:
        ValueError: the grid is not even in the logarithm, so that a mean over it means nothing.
    """
    if not losses:
        return None
    steps = np.diff(np.log(sorted(losses)))
    # A grid written with one or two digits, such as 3e-4, 1e-3, 3e-3, is meant to be even.
    if len(steps) > 1 and steps.max() - steps.min() > 0.15 * steps.mean():
        raise ValueError(f"rates={sorted(losses)}: must be evenly spaced in the logarithm")
    scores = [
        initial_loss if loss is None or not math.isfinite(loss) else min(loss, initial_loss)
        for loss in losses.values()
    ]
    return math.fsum(scores) / len(scores) - min(scores)
