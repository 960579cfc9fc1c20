"""What a design can see: the power of its tests of failing runs and of means, by simulation."""

import itertools
import math
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from src.study.analysis.permutation import SAME

NUM_STUDIES = 1_000
"""Studies that are simulated for one power."""

POWER = 0.8

STEPS = 20
"""Prevented shares are searched in steps of 1 / STEPS."""

NUM_MEANS = 500
"""Studies that are simulated for one detectable difference in means; each needs more work."""

MAX_LABELLINGS = 19_999
"""Random labellings of a simulated study, at most; fewer if the bound can be told with fewer."""

WIDEST = 64.0
"""Differences in means are searched up to this number of standard deviations of a run."""

SEEDS = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)


@cache
def power(
    *,
    share: float,
    prevented: float,
    num_seeds: int,
    num_arm: int,
    num_untreated: int,
    bound: float,
) -> float:
    """The share of simulated studies in which the arm's unadjusted p is at most `bound`.

    Args:
        share: the share of untreated runs that fail.
        prevented: the share of these failures that the remedy prevents, from 0 to 1.
        num_seeds: seeds of the study.
        num_arm: the arm's runs per seed.
        num_untreated: untreated runs per seed: the baseline's and the A/A control's.
        bound: what Holm's correction leaves to the arm.
    """
    if num_seeds < 2:
        return 0.0
    random = np.random.default_rng(0)
    size = (NUM_STUDIES, num_seeds)
    events = random.binomial(num_arm, share * (1 - prevented), size)
    both = events + random.binomial(num_untreated, share, size)
    total = num_arm + num_untreated
    counts = np.arange(num_seeds * num_arm + 1)
    if num_untreated > 1:
        # By number of failing runs in a seed: how many of them the arm has if labels are exchanged.
        known = [stats.hypergeom(total, k, num_arm).pmf(counts) for k in range(total + 1)]
        # A sum over seeds is a convolution, which is a product of Fourier transforms.
        transformed = np.fft.rfft(np.array(known), axis=1)
        chances = np.fft.irfft(np.prod(transformed[both], axis=1), n=len(counts), axis=1).clip(0)
    else:
        # Without an A/A control labels are exchanged across seeds.
        every = stats.hypergeom(num_seeds * total, both.sum(axis=1), num_seeds * num_arm)
        chances = every.pmf(counts[:, None]).T
    if num_untreated > 1:
        expected = both.sum(axis=1, keepdims=True) * num_arm / total
        distance = np.abs(counts[None, :] - expected)
        observed = np.abs(events.sum(axis=1, keepdims=True) - expected)
        is_as_extreme = distance >= observed - 1e-9
    else:
        # Fisher's test orders tables by their probability.
        own = np.take_along_axis(chances, events.sum(axis=1, keepdims=True), axis=1)
        is_as_extreme = chances <= own * (1 + 1e-7)
    p_values = np.where(is_as_extreme, chances, 0.0).sum(axis=1)
    return float(np.mean(p_values <= bound + 1e-12))


@cache
def detectable_prevention(
    *, share: float, num_seeds: int, num_arm: int, num_untreated: int, bound: float
) -> float | None:
    """The smallest share of failures that is detected with 80 % power if a remedy prevents it.

    None if not even a remedy that prevents all failures would be.
    """
    low, high = 0, STEPS + 1
    while high - low > 1:
        middle = (low + high) // 2
        found = power(
            share=share,
            prevented=middle / STEPS,
            num_seeds=num_seeds,
            num_arm=num_arm,
            num_untreated=num_untreated,
            bound=bound,
        )
        low, high = (low, middle) if found >= POWER else (middle, high)
    return high / STEPS if high <= STEPS else None


@cache
def seeds_needed(
    *, share: float, prevented: float, num_arm: int, num_untreated: int, bound: float
) -> int | None:
    """The number of seeds with which a remedy is detected with 80 % power; None above 100."""
    for num_seeds in SEEDS:
        found = power(
            share=share,
            prevented=prevented,
            num_seeds=num_seeds,
            num_arm=num_arm,
            num_untreated=num_untreated,
            bound=bound,
        )
        if found >= POWER:
            return num_seeds
    return None


@cache
def detectable_shift(
    *, num_seeds: int, num_arm: int, num_untreated: int, bound: float
) -> float | None:
    """The smallest difference in means that is detected with 80 % power.

    The runs of a seed are simulated as normal, and compared as in `permute`.

    Args:
        num_seeds: seeds of the study.
        num_arm: the arm's runs per seed.
        num_untreated: untreated runs per seed: the baseline's and the A/A control's.
        bound: what Holm's correction leaves to the arm.

    Returns:
        The difference in standard deviations of the runs of one seed; None if no p can be as small
        as the bound.
    """
    if num_seeds < 2:
        return None
    random = np.random.default_rng(0)
    num_drawn = min(MAX_LABELLINGS, math.ceil(100 / bound))
    is_arm = _labellings(num_seeds, num_arm, num_untreated, num_drawn, random)
    weights = np.where(is_arm, 1 / num_arm, -1 / num_untreated)
    differences = np.tensordot(
        weights, random.standard_normal((*weights.shape[1:], NUM_MEANS)), axes=2
    )
    # By how much each labelling's difference grows with a shift of the runs that are the arm's.
    growth = weights[:, is_arm[0]].sum(axis=1)[:, None]

    def found(shift: float) -> float:
        sizes = np.abs(differences + shift * growth)
        p_values = np.mean(sizes >= sizes[0] * (1 - SAME), axis=0)
        return float(np.mean(p_values <= bound + 1e-12))

    low, high = 0.0, WIDEST
    if found(high) < POWER:
        return None
    while high - low > high / 100:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return high


def _labellings(
    num_seeds: int, num_arm: int, num_untreated: int, num_drawn: int, random: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which runs of each seed are called the arm's, by labelling; the first is the true one.

    All labellings if they are at most `num_drawn`, otherwise as many random ones.
    """
    total = num_arm + num_untreated
    choices = np.zeros((math.comb(total, num_arm), total), dtype=bool)
    for choice, chosen in zip(choices, itertools.combinations(range(total), num_arm), strict=True):
        choice[list(chosen)] = True
    if len(choices) ** num_seeds <= num_drawn:
        places = np.array(list(itertools.product(range(len(choices)), repeat=num_seeds)))
    else:
        places = random.integers(len(choices), size=(num_drawn, num_seeds))
        places[0] = 0
    return np.asarray(choices[places])
