"""Statistics over runs and seeds: intervals, correlations, Holm's correction, LR sensitivity.

Built on scipy. The test of paired values is in permutation.py.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from scipy import stats

from src.study.analysis.results import Estimate, Proportion

ALPHA = 0.05
"""An adjusted p at or below this is significant."""

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


def design_effect_of(share: Proportion, *, num_seeds: int, within_seed: float) -> float:
    """By how much the runs of a seed, which fail alike, count as fewer (Kish 1965); at least 1."""
    return 1 + (share.total / num_seeds - 1) * max(0.0, within_seed)


def share_difference(
    arm: Proportion, untreated: Proportion, *, num_seeds: int, within_seed: float = 0.0
) -> Estimate | None:
    """Difference of two shares with Newcombe's 95 % interval; None if a share has no runs.

    The interval combines Wilson's intervals of both shares (Newcombe 1998, method 10). It keeps a
    width even if all runs agree, as in 0 of 6 against 6 of 6, where an interval over the seeds'
    differences has none.

    Args:
        arm: runs of the arm that failed.
        untreated: untreated runs that failed.
        num_seeds: the seeds of these runs.
        within_seed: the correlation of failures within a seed; above 0, the runs of one seed count
            as fewer (the design effect of Kish 1965).
    """
    if arm.total == 0 or untreated.total == 0:
        return None
    one, two = arm.events / arm.total, untreated.events / untreated.total
    (one_low, one_high), (two_low, two_high) = (
        wilson(
            share,
            design_effect=design_effect_of(share, num_seeds=num_seeds, within_seed=within_seed),
        )
        for share in (arm, untreated)
    )
    difference = one - two
    return Estimate(
        mean=difference,
        low=max(-1.0, difference - math.hypot(one - one_low, two_high - two)),
        high=min(1.0, difference + math.hypot(one_high - one, two - two_low)),
        num_seeds=num_seeds,
    )


@cache
def wilson(share: Proportion, *, design_effect: float = 1.0) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, of as many runs as are left after the design effect."""
    number, mean = share.total / design_effect, share.events / share.total
    z = float(stats.norm.ppf(1 - ALPHA / 2))
    shrunk = 1 + z * z / number
    middle = (mean + z * z / (2 * number)) / shrunk
    half = z / shrunk * math.sqrt(mean * (1 - mean) / number + (z / (2 * number)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def within_seed_correlation(seeds: Sequence[Sequence[float]]) -> float | None:
    """The correlation of values within a seed: ICC(1) by analysis of variance.

    None with fewer than two seeds of two runs, or if no value differs from another. An estimate
    below 0 means that seeds differ no more than chance would have it.
    """
    groups = [each for each in seeds if len(each) > 1]
    if len(groups) < 2:
        return None
    number = sum(map(len, groups))
    mean = math.fsum(value for each in groups for value in each) / number
    means = [math.fsum(each) / len(each) for each in groups]
    between = sum(len(g) * (m - mean) ** 2 for g, m in zip(groups, means, strict=True))
    within = sum((v - m) ** 2 for g, m in zip(groups, means, strict=True) for v in g)
    if between + within == 0:
        return None
    size = (number - sum(len(g) ** 2 for g in groups) / number) / (len(groups) - 1)
    between, within = between / (len(groups) - 1), within / (number - len(groups))
    return (between - within) / (between + (size - 1) * within)


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
