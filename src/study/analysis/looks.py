"""Sequential looks: testing arms while seeds are still being added.

A sequential study looks at its runs after a quarter, half, and all of its seeds, and trains an arm
on further seeds only while it is undecided. Looking several times would find a difference by chance
too often, so each look gets a part of the allowed error (Lan and DeMets 1983). Each look's p is
divided by the look's share, and the smallest counts. The arm's p is the probability that exchanged
labels give one as small at any look (Westfall and Young 1993). Looks to come count with their whole
share. Such sequential p values can be adjusted over arms by Holm, at every look (Maurer and Bretz
2013).

Giving up an arm early never adds to that error: the arm only has fewer looks.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from scipy import special, stats

from src.cli.name_checks import PRIMARIES
from src.common.number_format import p_equals, signed
from src.study.analysis.permutation import SAME, Pair, Permuted, chance_of_any
from src.study.analysis.results import ArmResult, Proportion
from src.study.analysis.stats import ALPHA, design_effect_of

SEED_SHARES = (0.25, 0.5, 1.0)
"""The share of the seeds that have been run at each look."""

ERROR_SHARES = (0.1, 0.2, 0.7)
"""The share of the error that each look spends; most is left for the last, the largest."""

LEAST_SEEDS = 12
"""With 12 seeds the first look sees 3, and fewer could hardly decide anything."""

FAILURES, LOSS = PRIMARIES

WORTHWHILE = 0.02
"""Nats; an arm is given up if its interval rules out that it lowers the loss by as much."""

Looks = Sequence[Sequence[int]]
"""The seeds of each look; each look has those of the one before, and more."""

Test = Callable[[Mapping[int, Pair]], Permuted]


def seeds_by_look(seeds: Sequence[int]) -> list[list[int]]:
    """The seeds of each look, in the order in which they were given."""
    return [list(seeds[: math.ceil(share * len(seeds))]) for share in SEED_SHARES]


def num_untreated(num_arms: int) -> int:
    """The best number of untreated runs per seed, the baseline's included, for this many arms.

    That is the square root of the number of arms (Dunnett 1955), and at least 2: with a single
    untreated run per seed, an exchange within seeds has hardly any power.
    """
    return max(2, round(math.sqrt(num_arms)))


def reached(seeds: Collection[int], looks: Looks) -> list[Sequence[int]]:
    """The looks that an arm has reached: those that add a seed on which it has been run."""
    found: list[Sequence[int]] = []
    for look in looks:
        before = set(found[-1]) if found else set()
        if not (set(look) - before) & set(seeds):
            break
        found.append(look)
    return found


def sequential(pairs: Mapping[int, Pair], looks: Looks, test: Test) -> Permuted:
    """The test of an arm that has been looked at repeatedly.

    Args:
        pairs: by seed. Seeds that are in no look are left out, because they may have been added
            for what a look showed.
        looks: those that the arm has reached.
        test: the test at one look.
    """
    errors = ERROR_SHARES[: len(looks)]
    each = [test({seed: pairs[seed] for seed in look if seed in pairs}) for look in looks]
    smallest = min(look.p_value / error for look, error in zip(each, errors, strict=True))
    possible, error = min((look.smallest_p / e, e) for look, e in zip(each, errors, strict=True))
    num_exact = len(list(itertools.takewhile(lambda look: look.is_exact, each)))
    if num_exact == len(looks):
        # Only the look with the smallest value can give it.
        possible *= error + 1 - sum(errors)
    return Permuted(
        p_value=1.0 if smallest >= 1 else _chance_of(smallest, pairs, looks[:num_exact]),
        smallest_p=min(1.0, possible),
        num_exact=num_exact,
    )


def last_bound(bound: float, pairs: Mapping[int, Pair], looks: Looks, num_exact: int) -> float:
    """The largest p at the last look with which an arm is significant, if the others show less.

    Args:
        bound: the largest p over all looks that is significant.
        pairs: as for `sequential`.
        looks: those that the arm has reached.
        num_exact: as in the result of `sequential`.
    """
    levels = np.linspace(bound, bound / ERROR_SHARES[-1], 9)
    number = bisect.bisect(
        levels, bound, key=lambda level: _chance_of(level, pairs, looks[:num_exact]) - SAME
    )
    return ERROR_SHARES[len(looks) - 1] * float(levels[max(number, 1) - 1])


def _chance_of(smallest: float, pairs: Mapping[int, Pair], exact: Looks) -> float:
    """The probability that some look's p is at most its share of the error times `smallest`.

    That is at most `smallest`, and less because a look may repeat what one before has found, and
    because p values come in steps. Looks to come, and those of which not all labellings can be
    counted, have their whole share.
    """
    errors = ERROR_SHARES[: len(exact)]
    known: set[int] = set()
    added: list[list[Pair]] = []
    for look in exact:
        added.append([pairs[seed] for seed in look if seed in pairs and seed not in known])
        known |= set(look)
    chance = chance_of_any(added, [smallest * error for error in errors])
    return smallest if chance is None else chance + smallest * (1 - sum(errors))


def chance_if_halved(
    arm: Proportion, untreated: Proportion, *, num_seeds: int = 0, within_seed: float = 0.0
) -> float:
    """The probability of at least as many failing runs in an arm that prevents half of them.

    The untreated share is uncertain as well; the probability is its mean over Jeffreys' posterior.
    A small one rules out a halving. It is 1 if none of the arm's runs fails, or no untreated one.

    Args:
        arm: runs of the arm that failed.
        untreated: untreated runs that failed.
        num_seeds: the seeds of these runs; 0: each run has a seed of its own.
        within_seed: the correlation of failures within a seed; above 0, the runs of one seed count
            as fewer (the design effect of Kish 1965).
    """
    if not arm.events or not untreated.events:
        return 1.0
    effects = [
        design_effect_of(share, num_seeds=num_seeds or share.total, within_seed=within_seed)
        for share in (arm, untreated)
    ]
    events, total = arm.events / effects[0], arm.total / effects[0]
    failed, finite = (
        number / effects[1] for number in (untreated.events, untreated.total - untreated.events)
    )
    share = stats.beta.ppf((np.arange(200) + 0.5) / 200, failed + 0.5, finite + 0.5)
    # The binomial tail as an incomplete beta function, which also takes fractions of runs.
    return float(special.betainc(events, total - events + 1, share / 2).mean())


def decision(arm: ArmResult, primary: str = FAILURES) -> str | None:
    """Why an arm needs no more seeds; None if it is undecided.

    An arm is given up if one that prevents half of the failures would have as many or more of them
    with a probability of at most 5 %, the same that the report asks for to rule out a halving.

    Args:
        arm: a compared arm that is no A/A control.
        primary: the endpoint that decides, of PRIMARIES.
    """
    return _loss_decision(arm) if primary == LOSS else _failure_decision(arm)


def so_far(arm: ArmResult, primary: str) -> str:
    """What the primary endpoint of an arm shows."""
    if primary == FAILURES:
        return f"{arm.nonfinite.events} of {arm.nonfinite.total} fail"
    difference = arm.comparisons["loss"].difference
    if difference is None:
        return "loss not known"
    ends = f"{signed(difference.low)} to {signed(difference.high)}"
    return f"loss {signed(difference.mean)} ({ends})"


def _loss_decision(arm: ArmResult) -> str | None:
    loss = arm.comparisons["loss"]
    if loss.difference is None or loss.p_value is None:
        return None
    own = so_far(arm, LOSS)
    if loss.detected:
        return f"{own}, significantly different (p {p_equals(loss.p_value)})"
    if loss.difference.low > -WORTHWHILE:
        return f"{own}, lowers the loss by less than {WORTHWHILE} nats"
    return None


def _failure_decision(arm: ArmResult) -> str | None:
    primary, untreated = arm.comparisons["nonfinite"], arm.untreated_nonfinite
    own = so_far(arm, FAILURES)
    if primary.detected:
        assert primary.p_value is not None
        return f"{own}, significantly different (p {p_equals(primary.p_value)})"
    if arm.trains_alike:
        return "it trains as its baseline does"
    if arm.censored_at is not None and arm.censored_at <= arm.acts_from:
        return f"it ends at step {arm.censored_at} and changes none before, so nothing is compared"
    if primary.p_value is None:
        # It could not act on any seed so far.
        return None
    if untreated is not None and untreated.total and not untreated.events:
        return f"none of {untreated.total} untreated runs fails, so nothing can be prevented"
    if primary.chance_if_halved is not None and primary.chance_if_halved <= ALPHA:
        return f"{own}, too many for a remedy that prevents half"
    return None
