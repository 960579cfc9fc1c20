"""The permutation test of paired seeds, over all arms of a study at once."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src.study.analysis.permutation import Pair, max_t, smallest_max_t_p

DIFFERENCES = [-41.0, 12.0, -118.0, -3.0, -70.0, -28.0]


def pairs(arm, baseline) -> dict[int, Pair]:
    """One run a side and seed."""
    return {
        seed: Pair(arm=(one,), baseline=(two,))
        for seed, (one, two) in enumerate(zip(arm, baseline, strict=True))
    }


def against_zero(differences) -> dict[int, Pair]:
    return pairs(differences, [0.0] * len(differences))


def test_sign_flips_of_one_arm_are_scipys_permutation_test():
    def t(x, axis):
        return np.mean(x, axis=axis) / np.std(x, axis=axis, ddof=1)

    # Over one sample, "samples" flips signs.
    expected = scipy_stats.permutation_test(
        (DIFFERENCES,), t, permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue

    assert max_t({"a": against_zero(DIFFERENCES)})["a"] == pytest.approx(expected)
    assert expected < 0.2


def by_the_book(arms: dict[str, list[float]]) -> dict[str, float]:
    """Westfall and Young's step-down procedure in plain loops, on complete seeds."""
    low = np.quantile([fmean(d * d for d in each) for each in arms.values()], 0.25)

    def t(differences) -> float:
        return abs(fmean(differences)) / math.sqrt(fmean(d * d for d in differences) + low)

    (number,) = {len(each) for each in arms.values()}
    order = sorted(arms, key=lambda name: -t(arms[name]))
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(order):
        count = 0
        for signs in itertools.product((1, -1), repeat=number):
            flipped = [
                t([sign * d for sign, d in zip(signs, arms[other], strict=True)])
                for other in order[rank:]
            ]
            count += max(flipped) >= t(arms[name]) - 1e-9
        largest = max(largest, count / 2**number)
        adjusted[name] = largest
    return adjusted


def test_max_t_is_the_textbooks_step_down():
    generator = np.random.default_rng(3)
    shared = generator.normal(size=7)
    arms = {
        name: list(generator.normal(size=7) - 0.3 * shared - shift)
        for name, shift in {"strong": 4.0, "weak": 1.2, "none": 0.0, "more": 0.0}.items()
    }

    found = max_t({name: against_zero(each) for name, each in arms.items()})

    assert found == pytest.approx(by_the_book(arms))
    assert len(set(found.values())) > 2 and found["strong"] < 0.05


def test_max_t_of_an_arm_is_least_where_no_other_is_beside_it():
    generator = np.random.default_rng(0)
    arms = {str(n): against_zero(generator.normal(size=6)) for n in range(4)}

    together = max_t(arms)

    assert all(together[name] >= max_t({name: arms[name]})[name] for name in arms)
    assert together != {name: max_t({name: arms[name]})[name] for name in arms}


def test_unanimous_arms_keep_the_smallest_p_however_many_they_are():
    generator = np.random.default_rng(1)
    arms = {str(n): against_zero(-2.0 - 0.1 * generator.random(6)) for n in range(20)}

    assert set(max_t(arms).values()) == {2 / 64}


def test_a_tiny_difference_that_all_seeds_share_hides_no_effect_beside_it():
    effect = against_zero([-1.0, -1.5, -0.7, -1.2, -2.0, -0.9])
    tiny = against_zero([0.001, -0.001, 0.001, 0.001, -0.001, 0.001])

    assert max_t({"effect": effect, "tiny": tiny})["effect"] == 2 / 64


def test_a_seed_that_an_arm_lacks_contributes_nothing_to_it():
    full, part = against_zero(DIFFERENCES), against_zero([5.0, -1.0, 3.0, 4.0, 2.0, 6.0])
    del part[1]

    found = max_t({"full": full, "part": part})

    assert max_t({"part": part})["part"] == 2 / 32
    assert found["full"] < 1 and found["part"] >= 2 / 32


def test_no_difference_at_all_is_no_evidence_and_equal_ones_are():
    same = against_zero([0.0] * 6)
    equal = against_zero([-3.0] * 6)

    assert max_t({"same": same, "equal": equal}) == {"same": 1.0, "equal": 2 / 64}


def test_repeats_are_relabelled_within_their_seed():
    data = {
        0: Pair(arm=(1.0, 4.0), baseline=(2.0, 7.0, 9.0)),
        1: Pair(arm=(0.5, 1.5), baseline=(3.0, 2.5, 1.0)),
        2: Pair(arm=(6.0, 5.0), baseline=(7.5, 8.0, 5.5)),
    }

    def every_difference(pair: Pair):
        runs = [*pair.arm, *pair.baseline]
        for places in itertools.combinations(range(len(runs)), len(pair.arm)):
            arm = [runs[place] for place in places]
            rest = [run for place, run in enumerate(runs) if place not in places]
            yield fmean(arm) - fmean(rest)

    observed = abs(fmean(pair.difference for pair in data.values()))
    relabelled = list(itertools.product(*(every_difference(pair) for pair in data.values())))
    expected = np.mean([abs(fmean(each)) >= observed - 1e-9 for each in relabelled])

    assert len(relabelled) == 10**3
    assert max_t({"a": data})["a"] == pytest.approx(expected)


def test_repeats_of_one_seed_alone_are_no_evidence():
    one = {0: Pair(arm=(0.0,) * 8, baseline=(9.0,) * 8)}

    assert max_t({"a": one})["a"] == 1.0


def test_more_than_can_be_enumerated_are_drawn_the_same_each_time():
    generator = np.random.default_rng(2)
    differences = generator.normal(loc=-0.5, size=20)
    arms = {"a": against_zero(differences)}

    first = max_t(arms)["a"]

    assert first == max_t(arms)["a"]
    # Twice the standard error of 10,000 draws, and what normal data leave between the two tests.
    assert first == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_arms_with_and_without_repeats_are_drawn_together():
    lone = {seed: Pair(arm=(-5.0 - seed,), baseline=(0.0,)) for seed in range(6)}
    three = {seed: Pair(arm=(-5.0, -5.1, -4.9), baseline=(0.0,)) for seed in range(6)}

    found = max_t({"lone": lone, "three": three})

    assert max_t({"three": three})["three"] == 1 / 4**6
    # Drawn: within three standard errors of what the arm has by itself.
    assert found["lone"] == pytest.approx(2 / 64, abs=0.005)
    assert found["three"] <= found["lone"]


@pytest.mark.parametrize(("num_seeds", "smallest"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_smallest_p_of_sign_flips_is_what_unanimous_seeds_reach(num_seeds, smallest):
    unanimous = against_zero([-1.0 - 0.1 * seed for seed in range(num_seeds)])

    assert smallest_max_t_p(unanimous) == smallest
    assert max_t({"a": unanimous})["a"] == smallest


def test_smallest_p_of_drawn_relabellings_is_that_of_the_observed_one_alone():
    unanimous = against_zero([-1.0 - 0.1 * seed for seed in range(20)])

    assert smallest_max_t_p(unanimous) == max_t({"a": unanimous})["a"] == 1 / 10_000


def test_variance_of_a_pair_is_that_over_all_its_relabellings():
    pair = Pair(arm=(1.0, 4.0), baseline=(2.0, 7.0, 9.0))
    runs = [*pair.arm, *pair.baseline]
    differences = [
        fmean(arm) - (sum(runs) - sum(arm)) / 3 for arm in itertools.combinations(runs, 2)
    ]

    assert pair.variance == pytest.approx(np.var(differences))
    assert Pair(arm=(5.0,), baseline=(2.0,)).variance == pytest.approx(9.0)


def test_smallest_p_with_repeats_counts_the_relabellings():
    three_to_one = Pair(arm=(1.0, 2.0, 3.0), baseline=(4.0,))
    two_to_two = Pair(arm=(1.0, 2.0), baseline=(3.0, 4.0))

    assert smallest_max_t_p({0: three_to_one, 1: three_to_one}) == 1 / 16
    assert smallest_max_t_p({0: two_to_two, 1: two_to_two}) == 2 / 36
    # One seed tells nothing of seeds, whatever its repeats.
    assert smallest_max_t_p({0: two_to_two}) == 1.0
