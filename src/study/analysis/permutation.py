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


def permute(pairs: Mapping[int, Pair]) -> Permuted:
    """Tests the mean difference over seeds.

    Args:
        pairs: by seed. With fewer than two seeds p is 1: one seed, however often it is repeated,
            says nothing about others.
    """
    if len(pairs) < 2:
        return Permuted(p_value=1.0, smallest_p=1.0)
    sizes = [(len(pair.arm), len(pair.baseline)) for pair in pairs.values()]
    number = math.prod(math.comb(one + two, one) for one, two in sizes)
    # If both sides have the same size, exchanging them all gives the same magnitude.
    smallest_p = (2 if all(one == two for one, two in sizes) else 1) / number
    observed = abs(math.fsum(pair.difference for pair in pairs.values()))
    values = [value for pair in pairs.values() for value in (*pair.arm, *pair.baseline)]
    scale = max(values) - min(values)
    if scale == 0:
        return Permuted(p_value=1.0, smallest_p=smallest_p)
    tolerance = SAME * scale * len(pairs)
    exact = _distribution(list(pairs.values()), tolerance)
    if exact is not None:
        sums, shares = np.abs(exact[0]), exact[1]
        p_value = float(shares[sums >= observed - tolerance].sum())
        return Permuted(p_value=p_value, smallest_p=smallest_p)
    generator = np.random.default_rng(0)
    drawn = np.zeros(NUM_DRAWN)
    for pair in pairs.values():
        drawn += pair.drawn(generator)
    # The observed labelling is one of them.
    as_large = 1 + int((np.abs(drawn) >= observed - tolerance).sum())
    drawn_p = as_large / (NUM_DRAWN + 1)
    return Permuted(p_value=drawn_p, smallest_p=max(smallest_p, 1 / (NUM_DRAWN + 1)))


def _distribution(pairs: Sequence[Pair], tolerance: float) -> tuple[Sums, Sums] | None:
    """All sums of one choice per seed with their probabilities; None if there are too many."""
    sums: Sums = np.zeros(1)
    shares: Sums = np.ones(1)
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
