"""Tests of all arms of a study, adjusted by Holm, and the smallest effect that each can detect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from src.study.analysis.permutation import Pair, max_t, smallest_max_t_p
from src.study.analysis.results import Proportion
from src.study.analysis.stats import (
    ALPHA,
    fisher,
    holm,
    smallest_fisher_p,
    smallest_mean_effect,
    smallest_share,
)

Data = TypeVar("Data")


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The result for one arm, as in Comparison."""

    p_value: float
    smallest_p: float
    smallest_effect: float | None

    @property
    def detected(self) -> bool:
        """Whether the arm is significantly different from its baseline."""
        return self.p_value <= ALPHA


def shares(arms: Mapping[str, tuple[Proportion, Proportion]]) -> dict[str, Tested]:
    """Fisher's test of each arm's share against its baseline's, with Holm's correction.

    Args:
        arms: the shares of arm and baseline, each of at least one seed.
    """
    tested = {}
    for name, (family, p_value) in _adjusted(arms, _fisher_holm, best=_smallest_raw_p).items():
        arm, baseline = arms[name]
        # Holm is step-down: what this arm could have shown depends on the others' results.
        others = tuple(fisher(*family[other]) for other in family if other != name)
        tested[name] = Tested(
            p_value=p_value,
            smallest_p=holm(dict(enumerate((smallest_fisher_p(arm.total), *others))))[0],
            smallest_effect=smallest_share(baseline, num_seeds=arm.total, others=others),
        )
    return tested


def means(arms: Mapping[str, Mapping[int, Pair]]) -> dict[str, Tested]:
    """Step-down max-T over the arms' paired differences.

    Args:
        arms: pairs by seed, at least one per arm.
    """
    tested = {}
    for name, (_, p_value) in _adjusted(arms, max_t, best=smallest_max_t_p).items():
        smallest_p = smallest_max_t_p(arms[name])
        differences = [pair.difference for pair in arms[name].values()]
        # If no p can be small enough, no effect is detectable.
        effect = smallest_mean_effect(differences) if smallest_p <= ALPHA else None
        tested[name] = Tested(p_value=p_value, smallest_p=smallest_p, smallest_effect=effect)
    return tested


def _fisher_holm(arms: Mapping[str, tuple[Proportion, Proportion]]) -> dict[str, float]:
    return holm({name: fisher(arm, baseline) for name, (arm, baseline) in arms.items()})


def _smallest_raw_p(arm: tuple[Proportion, Proportion]) -> float:
    return smallest_fisher_p(arm[0].total)


def _adjusted(
    arms: Mapping[str, Data],
    test: Callable[[Mapping[str, Data]], dict[str, float]],
    *,
    best: Callable[[Data], float],
) -> dict[str, tuple[Mapping[str, Data], float]]:
    """Every arm's adjusted p, and the family in which it was adjusted.

    An arm with too few seeds to be significant whatever they show costs the other arms no power:
    those are a family without it (Tarone 1990). Its own p is adjusted over all arms.
    """
    able = {name: data for name, data in arms.items() if best(data) <= ALPHA}
    adjusted: dict[str, tuple[Mapping[str, Data], float]] = {}
    if able:
        adjusted = {name: (able, p_value) for name, p_value in test(able).items()}
    if len(able) < len(arms):
        everything = test(arms).items()
        adjusted |= {name: (arms, p) for name, p in everything if name not in able}
    return adjusted
