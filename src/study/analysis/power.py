"""What a design can see: the power of its tests of failing runs and of means, by simulation."""

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from src.study.analysis.permutation import NUM_DRAWN, SAME

Labels = npt.NDArray[np.bool_]

NUM_STUDIES = 1_000
"""Studies that are simulated for one power."""

POWER = 0.8

STEPS = 20
"""Prevented shares are searched in steps of 1 / STEPS."""

NUM_MEANS, NUM_DIFFERENCES = 500, 2_000_000
"""Studies that are simulated for a detectable difference in means: NUM_DIFFERENCES divided by the
number of labellings, and at least NUM_MEANS."""

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
    num_studies: int = NUM_STUDIES,
) -> float:
    """The share of simulated studies in which the arm's unadjusted p is at most `bound`.

    Args:
        share: the share of untreated runs that fail.
        prevented: the share of these failures that the remedy prevents, from 0 to 1.
        num_seeds: seeds of the study.
        num_arm: the arm's runs per seed.
        num_untreated: untreated runs per seed: the baseline's and the A/A control's.
        bound: what Holm's correction leaves to the arm.
        num_studies: the number of simulated studies.
    """
    if num_seeds < 2:
        return 0.0
    random = np.random.default_rng(0)
    size = (num_studies, num_seeds)
    events = random.binomial(num_arm, share * (1 - prevented), size)
    both = events + random.binomial(num_untreated, share, size)
    total = num_arm + num_untreated
    counts = np.arange(num_seeds * num_arm + 1)
    if num_untreated > 1:
        # By number of failing runs in a seed: how many of them the arm has if labels are exchanged.
        known = stats.hypergeom.pmf(counts, total, np.arange(total + 1)[:, None], num_arm)
        # A sum over seeds is a convolution, which is a product of Fourier transforms.
        transformed = np.fft.rfft(known, axis=1)
        chances = np.fft.irfft(np.prod(transformed[both], axis=1), n=len(counts), axis=1).clip(0)
    else:
        # Without an A/A control labels are exchanged across seeds.
        sizes = num_seeds * total, both.sum(axis=1, keepdims=True), num_seeds * num_arm
        chances = stats.hypergeom.pmf(counts, *sizes)
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
def detectable_shift(sizes: tuple[tuple[int, int], ...], *, bound: float) -> float | None:
    """The smallest difference in means that is detected with 80 % power.

    Runs are simulated as normal, and compared as in `permute`.

    Args:
        sizes: for each seed, the number of the arm's runs and of the untreated runs.
        bound: what Holm's correction leaves to the arm.

    Returns:
        The difference in standard deviations of the runs of one seed; None if no p can be as small
        as the bound.
    """
    random = np.random.default_rng(0)
    # With 20 labellings below the bound, the bound is known well enough.
    num_drawn = min(NUM_DRAWN + 1, math.ceil(20 / bound))
    is_all = math.prod(math.comb(arm + others, arm) for arm, others in sizes) <= num_drawn
    labellings = _all_labellings(sizes) if is_all else _drawn_labellings(sizes, num_drawn, random)
    num_allowed = math.floor(bound * len(labellings[0]) + SAME)
    if num_allowed < 1:
        return None
    weights = np.hstack(
        [
            np.where(is_arm, 1 / (arm * len(sizes)), -1 / (others * len(sizes)))
            for (arm, others), is_arm in zip(sizes, labellings, strict=True)
        ],
        dtype=np.float32,
    )
    num_studies = max(NUM_MEANS, NUM_DIFFERENCES // len(weights))
    difference = weights @ random.standard_normal((weights.shape[1], num_studies), dtype=np.float32)
    growth = weights[:, weights[0] > 0].sum(axis=1, keepdims=True)
    # A shift of the arm's runs adds itself to the difference, and `growth` of it to the difference
    # under a labelling, which is as large up to a certain shift.
    with np.errstate(divide="ignore", invalid="ignore"):
        up_to = np.maximum(
            np.where(growth > 0.9999, np.inf, (difference - difference[0]) / (1 - growth)),
            np.where(growth < -0.9999, np.inf, (difference + difference[0]) / (-1 - growth)),
        )
    place = len(up_to) - num_allowed - 1
    detected_from = np.partition(up_to, place, axis=0)[place]
    shift = float(np.quantile(detected_from, POWER, method="higher"))
    return shift if math.isfinite(shift) else None


def _all_labellings(sizes: Sequence[tuple[int, int]]) -> list[Labels]:
    """For each seed, which runs every labelling calls the arm's; the first labelling is true."""
    choices = []
    for arm, others in sizes:
        chosen = np.array(list(itertools.combinations(range(arm + others), arm)))
        choices.append((chosen[:, :, None] == np.arange(arm + others)).any(axis=1))
    places = np.array(list(itertools.product(*(range(len(each)) for each in choices))))
    return [each[places[:, number]] for number, each in enumerate(choices)]


def _drawn_labellings(
    sizes: Sequence[tuple[int, int]], num_drawn: int, random: np.random.Generator
) -> list[Labels]:
    """As `_all_labellings`, for the true labelling and random ones."""
    drawn = []
    for arm, others in sizes:
        ranks = random.random((num_drawn, arm + others)).argsort(axis=1)
        ranks[0] = np.arange(arm + others)
        drawn.append(ranks < arm)
    return drawn
