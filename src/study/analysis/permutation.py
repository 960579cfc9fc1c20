"""The permutation test of one arm: its runs against untreated runs, exchanged within seeds.

If the arm has no effect, its runs could be exchanged with the untreated runs of the same seed,
which have the same initial weights and data order. This holds whether seeds differ or not.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MAX_EXACT = 2**14
"""Up to this number of different sums, the distribution is exact."""

NUM_DRAWN = 19_999
"""If there are more, this number of labellings is drawn, in addition to the observed one."""

SAME = 1e-9
"""Relative tolerance within which two sums count as equal."""

Sums = npt.NDArray[np.float64]

START: tuple[Sums, Sums] = np.zeros(1), np.ones(1)
"""The sum over no seed, with its probability."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The values of one seed, one per run in order of repeats; at least one on each side."""

    arm: tuple[float, ...]
    baseline: tuple[float, ...]
    """The untreated runs: the baseline's, then those of the matched A/A control."""

    @property
    def difference(self) -> float:
        """Mean of the arm minus mean of the untreated runs."""
        return math.fsum(self.arm) / len(self.arm) - math.fsum(self.baseline) / len(self.baseline)

    @property
    def num_choices(self) -> int:
        """The number of ways to choose the arm's runs."""
        return math.comb(len(self.arm) + len(self.baseline), len(self.arm))

    @cached_property
    def relabelled(self) -> Sums:
        """The difference under every choice of the arm's runs, each equally likely."""
        runs = np.array([*self.arm, *self.baseline])
        size, rest = len(self.arm), len(self.baseline)
        chosen = np.array(list(itertools.combinations(range(len(runs)), size)))
        sums = runs[chosen].sum(axis=1)
        return np.asarray(sums / size - (runs.sum() - sums) / rest)

    def drawn(self, generator: np.random.Generator) -> Sums:
        """The difference under NUM_DRAWN random choices."""
        if self.num_choices <= MAX_EXACT:
            return np.asarray(generator.choice(self.relabelled, size=NUM_DRAWN))
        runs = np.array([*self.arm, *self.baseline])
        size, rest = len(self.arm), len(self.baseline)
        sums = generator.permuted(np.tile(runs, (NUM_DRAWN, 1)), axis=1)[:, :size].sum(axis=1)
        return np.asarray(sums / size - (runs.sum() - sums) / rest)


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """The result of the test."""

    p_value: float
    """Two-sided: the share of labellings whose mean difference is at least as large."""
    smallest_p: float
    """The smallest p that this number of runs could give, whatever they show."""
    is_exact: bool = False
    """Whether all labellings within seeds were counted."""
    num_exact: int = 0
    """Of a test over several looks, the first ones of which that is true."""


def permute(pairs: Mapping[int, Pair]) -> Permuted:
    """Tests the mean difference over seeds.

    Args:
        pairs: by seed. With fewer than two seeds p is 1: one seed, however often it is repeated,
            says nothing about others.
    """
    if len(pairs) < 2:
        return Permuted(p_value=1.0, smallest_p=1.0, is_exact=True)
    sizes = [(len(pair.arm), len(pair.baseline)) for pair in pairs.values()]
    number = math.prod(math.comb(one + two, one) for one, two in sizes)
    # If both sides have the same size, exchanging them all gives the same magnitude.
    smallest_p = (2 if all(one == two for one, two in sizes) else 1) / number
    observed = abs(math.fsum(pair.difference for pair in pairs.values()))
    tolerance = _tolerance(list(pairs.values()))
    if tolerance == 0:
        return Permuted(p_value=1.0, smallest_p=smallest_p, is_exact=True)
    exact = _distribution(list(pairs.values()), tolerance)
    if exact is not None:
        sums, shares = np.abs(exact[0]), exact[1]
        p_value = float(shares[sums >= observed - tolerance].sum())
        return Permuted(p_value=p_value, smallest_p=smallest_p, is_exact=True)
    generator = np.random.default_rng(0)
    drawn = np.zeros(NUM_DRAWN)
    for pair in pairs.values():
        drawn += pair.drawn(generator)
    # The observed labelling is one of them.
    as_large = 1 + int((np.abs(drawn) >= observed - tolerance).sum())
    drawn_p = as_large / (NUM_DRAWN + 1)
    return Permuted(p_value=drawn_p, smallest_p=max(smallest_p, 1 / (NUM_DRAWN + 1)))


def chance_of_any(looks: Sequence[Sequence[Pair]], bounds: Sequence[float]) -> float | None:
    """The probability that an arm without an effect has a small p at any of several looks.

    Args:
        looks: the seeds that each look adds to those before.
        bounds: by look, the largest p that counts as small; below 1.

    Returns:
        None if there are too many labellings to count them all.
    """
    chance = 0.0
    seen: list[Pair] = []
    every = rest = START
    for look, bound in zip(looks, bounds, strict=True):
        seen += look
        tolerance = _tolerance(seen)
        # Where all values are the same, every sum is 0, and rounding is all that they differ by.
        merged = tolerance or 1.0
        grown = _distribution(look, merged, every)
        # Until a labelling is taken out, the rest is all of them.
        grown_rest = grown if rest is every else _distribution(look, merged, rest)
        if grown is None or grown_rest is None:
            return None
        every, (sums, shares) = grown, grown_rest
        # As in `permute`, one seed says nothing, nor do values that are all the same.
        says_nothing = len(seen) < 2 or tolerance == 0
        limit = math.inf if says_nothing else _smallest_sum(every, bound, tolerance)
        is_small = np.abs(sums) >= limit - tolerance
        chance += float(shares[is_small].sum())
        rest = (sums[~is_small], shares[~is_small]) if is_small.any() else grown_rest
    return chance


def _tolerance(pairs: Sequence[Pair]) -> float:
    """How much equal sums may differ by rounding; 0 if all values are the same."""
    values = [value for pair in pairs for value in (*pair.arm, *pair.baseline)]
    return SAME * (max(values) - min(values)) * len(pairs) if values else 0.0


def _smallest_sum(distribution: tuple[Sums, Sums], bound: float, tolerance: float) -> float:
    """The smallest magnitude of a sum whose p is at most `bound`; infinite if there is none."""
    order = np.argsort(-np.abs(distribution[0]))
    sums, p_values = np.abs(distribution[0])[order], np.cumsum(distribution[1][order])
    # Sums that are equal but for rounding share the p of the last of them.
    is_last = np.append(sums[:-1] - sums[1:] > tolerance, True)
    small = sums[is_last & (p_values <= bound * (1 + SAME))]
    return float(small[-1]) if len(small) else math.inf


def _distribution(
    pairs: Sequence[Pair], tolerance: float, start: tuple[Sums, Sums] = START
) -> tuple[Sums, Sums] | None:
    """All sums of one choice per seed with their probabilities; None if there are too many.

    Args:
        pairs: one per seed.
        tolerance: sums that differ by less are merged.
        start: the sums to which these seeds are added.
    """
    sums, shares = start
    for pair in pairs:
        if pair.num_choices > MAX_EXACT or len(sums) * pair.num_choices > 64 * MAX_EXACT:
            return None
        each = pair.relabelled
        found = np.add.outer(sums, each).ravel()
        # Equal sums differ in their last bits. They are merged, but not rounded: that would add up.
        _, first, places = np.unique(
            np.round(found / tolerance), return_index=True, return_inverse=True
        )
        if len(first) > MAX_EXACT:
            return None
        weights = np.repeat(shares / len(each), len(each))
        shares = np.asarray(np.bincount(places, weights=weights), dtype=np.float64)
        sums = found[first]
    return sums, shares
