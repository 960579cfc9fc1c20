"""Statistics over seeds: intervals, Fisher's test, Holm's correction, detectable effects.

Built on scipy. The test of paired values is in permutation.py.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

from src.study.analysis.results import Estimate, Proportion

ALPHA = 0.05
"""An adjusted p at or below this is significant."""

POWER = 0.8

Name = TypeVar("Name", bound=Hashable)


def interval(values: Sequence[float]) -> Estimate | None:
    """Mean with Student's 95 % interval; None if there are no values."""
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
    """Difference of two shares with Newcombe's 95 % interval; None if a share has no seeds.

    The interval combines Wilson's intervals of both shares (Newcombe 1998, method 10). It keeps a
    width even if all seeds agree, as in 0 of 6 against 6 of 6, where an interval over the seeds'
    differences has none. Like Fisher's test it ignores the pairing.
    """
    if arm.total == 0 or baseline.total == 0:
        return None
    one, two = arm.events / arm.total, baseline.events / baseline.total
    one_low, one_high = wilson(arm)
    two_low, two_high = wilson(baseline)
    difference = one - two
    return Estimate(
        mean=difference,
        low=max(-1.0, difference - math.hypot(one - one_low, two_high - two)),
        high=min(1.0, difference + math.hypot(one_high - one, two - two_low)),
        num_seeds=arm.total,
    )


@cache
def wilson(share: Proportion) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    ends = stats.binomtest(share.events, share.total).proportion_ci(1 - ALPHA, method="wilson")
    return float(ends.low), float(ends.high)


@cache
def fisher(arm: Proportion, baseline: Proportion) -> float:
    """Two-sided p of Fisher's exact test; 1 if a side is empty."""
    table = [
        [arm.events, arm.total - arm.events],
        [baseline.events, baseline.total - baseline.events],
    ]
    return float(stats.fisher_exact(table).pvalue)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p (1979): of n values the smallest times n, the next times n - 1, ..."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def smallest_fisher_p(num_seeds: int) -> float:
    """The p of all seeds against none, before Holm's correction."""
    return fisher(
        Proportion(events=0, total=num_seeds), Proportion(events=num_seeds, total=num_seeds)
    )


@cache
def smallest_share(
    baseline: Proportion, *, num_seeds: int, others: tuple[float, ...] = ()
) -> float | None:
    """The smallest decrease in the share of seeds that is significant after Holm's correction.

    Holm's correction is step-down: an arm pays only for the arms whose p is not smaller than its
    own. So the answer depends on the results of the other arms. Multiplying by the number of arms
    (Bonferroni) would understate the power whenever another arm is significant.

    Args:
        baseline: the share observed in the baseline.
        num_seeds: the number of seeds of the arm.
        others: p values of the other arms of the family, before Holm's correction.

    Returns:
        A magnitude above 0, or None if even an arm without any event would not be significant.
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
    """The minimum detectable effect of a paired t test, as mean over standard deviation.

    For one arm, two-sided at 5 %, with 80 % power. From the non-central t distribution, ignoring
    rejections in the wrong direction. None below two seeds.
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
    """The minimum detectable effect in units of the differences; None if they do not vary."""
    if len(differences) < 2:
        return None
    deviation = float(np.std(differences, ddof=1))
    effect = smallest_standardized_effect(len(differences))
    return None if effect is None or deviation == 0 else effect * deviation


def lr_sensitivity(losses: Mapping[float, float | None], *, initial_loss: float) -> float | None:
    """LR sensitivity: how much the loss depends on the learning rate (arXiv 2309.14322).

    The mean over the rates of min(loss, initial loss), minus the lowest.

    Args:
        losses: final loss by rate, on a grid that is even on a log scale. A run that diverged has
            None or a non-finite loss, and counts as the initial loss.
        initial_loss: the loss of the untrained model.

    Returns:
        In nats per token; None if there are no rates.

    Raises:
        ValueError: the grid is not even on a log scale, so a mean over it has no meaning.
    """
    if not losses:
        return None
    steps = np.diff(np.log(sorted(losses)))
    # The tolerance accepts rounded grids such as 3e-4, 1e-3, 3e-3.
    if len(steps) > 1 and steps.max() - steps.min() > 0.15 * steps.mean():
        raise ValueError(f"rates={sorted(losses)}: must be evenly spaced on a log scale")
    scores = [
        initial_loss if loss is None or not math.isfinite(loss) else min(loss, initial_loss)
        for loss in losses.values()
    ]
    return math.fsum(scores) / len(scores) - min(scores)
