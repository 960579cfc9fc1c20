"""Tests of all arms of a family, adjusted by Holm, and the effects that each could detect."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median_low

import numpy as np

from src.study.analysis import power
from src.study.analysis.looks import Looks, Test, last_bound, sequential
from src.study.analysis.permutation import Pair, Permuted, permute
from src.study.analysis.results import Proportion
from src.study.analysis.stats import ALPHA, fisher, holm


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The result for one arm, as in Comparison."""

    p_value: float
    smallest_p: float
    bound: float
    """The largest unadjusted p at which the arm would be significant beside the others' results."""
    num_exact: int = 0
    """As in Permuted."""
    smallest_effect: float | None = None
    seeds_for_half: int | None = None
    seeds_for_all: int | None = None

    @property
    def detected(self) -> bool:
        """Whether the arm is significantly different from the untreated runs."""
        return self.p_value <= ALPHA


def shares(
    arms: Mapping[str, Mapping[int, Pair]],
    untreated: Mapping[str, Proportion],
    *,
    looks: Mapping[str, Looks] | None = None,
) -> dict[str, Tested]:
    """Tests the share of failing runs.

    Args:
        arms: 1 for each run that failed and 0 for each other, by arm and seed.
        untreated: by arm, the untreated runs that failed.
        looks: by arm, the looks that it has reached in a sequential study; otherwise none.
    """
    looks = looks or {}
    tested = {}
    for name, found in adjusted(_each(arms, looks, _of_failures), looks).items():
        pairs, control = arms[name].values(), untreated[name]
        share = control.events / control.total if control.total else 0.0
        design = {
            "num_arm": median_low([len(pair.arm) for pair in pairs]),
            "num_untreated": median_low([len(pair.baseline) for pair in pairs]),
            "bound": _last_bound(found, arms[name], looks.get(name)),
        }
        effect = power.detectable_prevention(share=share, num_seeds=len(pairs), **design)
        half, every = (
            power.seeds_needed(share=share, prevented=prevented, **design)
            for prevented in (0.5, 1.0)
        )
        tested[name] = replace(
            found, smallest_effect=effect, seeds_for_half=half, seeds_for_all=every
        )
    return tested


def means(
    arms: Mapping[str, Mapping[int, Pair]], *, looks: Mapping[str, Looks] | None = None
) -> dict[str, Tested]:
    """Tests mean differences; `with_detectable_differences` adds what could be detected.

    Args:
        arms: values by arm and seed.
        looks: as for `shares`.
    """
    looks = looks or {}
    return adjusted(_each(arms, looks, permute), looks)


def with_detectable_differences(
    tested: Mapping[str, Tested],
    arms: Mapping[str, Mapping[int, Pair]],
    *,
    looks: Mapping[str, Looks] | None = None,
) -> dict[str, Tested]:
    """The results of `means` of the same arms and looks, with their minimum detectable effects."""
    results = dict(tested)
    for name, found in tested.items():
        pairs = list(arms[name].values())
        # Without a difference between seeds there is nothing to find a bound for.
        if len({pair.difference for pair in pairs}) > 1:
            bound = _last_bound(found, arms[name], (looks or {}).get(name))
            effect = detectable_difference(pairs, bound=bound)
            results[name] = replace(found, smallest_effect=effect)
    return results


def detectable_difference(pairs: Sequence[Pair], *, bound: float) -> float | None:
    """The minimum detectable effect of a study like this, in units of the values.

    Args:
        pairs: the values of each seed.
        bound: as for `power.detectable_shift`.

    Returns:
        None if the differences do not vary, or if no effect would be detected.
    """
    differences = [pair.difference for pair in pairs]
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if deviation == 0.0:
        return None
    sizes = sorted((len(pair.arm), len(pair.baseline)) for pair in pairs)
    shift = power.detectable_shift(tuple(sizes), bound=bound)
    if shift is None:
        return None
    # Of two means of runs with this deviation, the difference varies as the differences do.
    variance = fmean(1 / arm + 1 / untreated for arm, untreated in sizes)
    return shift * deviation / math.sqrt(variance)


def _last_bound(found: Tested, pairs: Mapping[int, Pair], looks: Looks | None) -> float:
    """The largest p that is significant, at the arm's last look if there are looks."""
    return last_bound(found.bound, pairs, looks, found.num_exact) if looks else found.bound


def _each(
    arms: Mapping[str, Mapping[int, Pair]], looks: Mapping[str, Looks], test: Test
) -> dict[str, Permuted]:
    return {
        name: sequential(pairs, looks[name], test) if looks.get(name) else test(pairs)
        for name, pairs in arms.items()
    }


def _of_failures(pairs: Mapping[int, Pair]) -> Permuted:
    """The permutation test of failures, or Fisher's without an A/A control and with several seeds.

    With a single untreated run per seed an exchange within seeds has hardly any power (it is
    McNemar's test). Then runs are exchanged across seeds, which is Fisher's test. It is
    conservative if runs of one seed fail alike, because each seed has runs on both sides.
    """
    if len(pairs) < 2 or median_low([len(pair.baseline) for pair in pairs.values()]) > 1:
        return permute(pairs)
    arm, untreated = (
        Proportion(events=round(sum(runs)), total=len(runs))
        for runs in (
            [value for pair in pairs.values() for value in pair.arm],
            [value for pair in pairs.values() for value in pair.baseline],
        )
    )
    best = fisher(
        Proportion(events=0, total=arm.total),
        Proportion(events=untreated.total, total=untreated.total),
    )
    return Permuted(p_value=fisher(arm, untreated), smallest_p=best)


def adjusted(
    raw: Mapping[str, Permuted], looks: Mapping[str, Looks] | None = None
) -> dict[str, Tested]:
    """Holm's correction over a family.

    An arm with so few runs that no result could be significant costs the others no power: they are
    a family without it (Tarone 1990). Its own p is adjusted over all arms. An arm that was given up
    at a look stays in the family: it has few runs because of what they showed.

    Args:
        raw: unadjusted results by arm.
        looks: as for `shares`.
    """
    looked_at = {name for name, each in (looks or {}).items() if each}
    able = [name for name, p in raw.items() if p.smallest_p <= ALPHA or name in looked_at]
    tested = {}
    for name, found in raw.items():
        family = able if name in able else list(raw)
        p_values = {other: raw[other].p_value for other in family}
        others = [p_value for other, p_value in p_values.items() if other != name]
        tested[name] = Tested(
            p_value=holm(p_values)[name],
            smallest_p=found.smallest_p,
            bound=holm_bound(others),
            num_exact=found.num_exact,
        )
    return tested


def holm_bound(others: Sequence[float]) -> float:
    """The largest unadjusted p at which one more arm is significant beside these.

    Holm's correction is step-down: an arm pays only for the arms that are not significant before
    it, so the bound depends on the others' results.
    """
    left = len(others) + 1
    for p_value in sorted(others):
        if p_value > ALPHA / left:
            break
        left -= 1
    return ALPHA / left
