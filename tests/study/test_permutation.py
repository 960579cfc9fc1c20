"""The permutation test of an arm's runs and untreated runs, exchanged within seeds."""

import itertools
from statistics import fmean

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src.study.analysis.permutation import NUM_DRAWN, Pair, permute

DIFFERENCES = [-41.0, 12.0, -118.0, -3.0, -70.0, -28.0]


def pairs(arm, baseline) -> dict[int, Pair]:
    """One run a side and seed."""
    return {
        seed: Pair(arm=(one,), baseline=(two,))
        for seed, (one, two) in enumerate(zip(arm, baseline, strict=True))
    }


def against_zero(differences) -> dict[int, Pair]:
    return pairs(differences, [0.0] * len(differences))


def test_with_one_run_a_side_signs_are_flipped_as_scipy_flips_them():
    # Over one sample, "samples" flips signs.
    expected = scipy_stats.permutation_test(
        (DIFFERENCES,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue

    assert permute(against_zero(DIFFERENCES)).p_value == pytest.approx(expected)
    assert expected < 0.2


def every_difference(pair: Pair):
    runs = [*pair.arm, *pair.baseline]
    for places in itertools.combinations(range(len(runs)), len(pair.arm)):
        rest = [run for place, run in enumerate(runs) if place not in places]
        yield fmean(runs[place] for place in places) - fmean(rest)


def by_the_book(data) -> float:
    """Every choice of runs in every seed, in plain loops."""
    observed = abs(fmean(pair.difference for pair in data.values()))
    relabelled = itertools.product(*(every_difference(pair) for pair in data.values()))
    return float(np.mean([abs(fmean(each)) >= observed - 1e-9 for each in relabelled]))


def test_runs_are_relabelled_within_their_seed():
    data = {
        0: Pair(arm=(1.0, 4.0), baseline=(2.0, 7.0, 9.0)),
        1: Pair(arm=(0.5, 1.5), baseline=(3.0, 2.5, 1.0)),
        2: Pair(arm=(6.0, 5.0), baseline=(7.5, 8.0, 5.5)),
    }

    found = permute(data)

    assert found.p_value == pytest.approx(by_the_book(data))
    assert found.smallest_p == 1 / 10**3


def test_failures_of_many_seeds_are_exact():
    # The published router: 0 of 10 against 39 of 40, in one seed 3 of 4.
    cured = {
        seed: Pair(arm=(0.0,), baseline=(1.0, 1.0, 1.0, float(seed > 0))) for seed in range(10)
    }

    assert permute(cured).p_value == pytest.approx((1 / 5) ** 9 * (2 / 5))


def test_failures_of_random_studies_are_exact():
    """Thirds and fifths of seeds add up to sums that differ in their last bits."""
    generator = np.random.default_rng(5)
    for _ in range(40):
        untreated = int(generator.integers(1, 5))
        data = {
            seed: Pair(
                arm=(float(generator.integers(2)),),
                baseline=tuple(map(float, generator.integers(2, size=untreated))),
            )
            for seed in range(5)
        }
        found = permute(data)
        assert found.p_value == pytest.approx(by_the_book(data))
        assert found.p_value >= found.smallest_p - 1e-12
    many = {seed: Pair(arm=(1.0,), baseline=(1.0, 0.0, 0.0)) for seed in range(12)}
    # All twelve from the half of failing runs, or none of them, is as far.
    assert permute(many).p_value == pytest.approx(2 / 2**12)


def test_many_runs_of_a_seed_are_drawn():
    generator = np.random.default_rng(6)
    data = {
        seed: Pair(arm=tuple(generator.normal(size=16)), baseline=tuple(generator.normal(size=17)))
        for seed in range(2)
    }
    assert 0.01 < permute(data).p_value <= 1


def test_a_draw_is_the_same_each_time_and_near_to_the_exact_p():
    generator = np.random.default_rng(2)
    data = {
        seed: Pair(arm=(generator.normal() - 0.7,), baseline=tuple(generator.normal(size=3)))
        for seed in range(5)
    }
    more = data | {seed: Pair(arm=(0.0,), baseline=(0.0,) * 3) for seed in range(5, 9)}
    many = {
        seed: Pair(arm=(generator.normal() - 0.5,), baseline=tuple(generator.normal(size=4)))
        for seed in range(20)
    }

    assert permute(more).p_value == pytest.approx(by_the_book(data))
    found = permute(many)
    assert found == permute(many)
    assert found.smallest_p == 1 / (NUM_DRAWN + 1)
    differences = [pair.difference for pair in many.values()]
    # What normal data leave between the two tests.
    assert found.p_value == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_no_difference_at_all_is_no_evidence_and_equal_ones_are():
    assert permute(against_zero([0.0] * 6)).p_value == 1.0
    assert permute(against_zero([-3.0] * 6)).p_value == 2 / 64


def test_one_seed_alone_is_no_evidence():
    one = {0: Pair(arm=(0.0,) * 8, baseline=(9.0,) * 8)}

    assert permute(one).p_value == permute(one).smallest_p == permute({}).p_value == 1.0


@pytest.mark.parametrize(("num_seeds", "smallest"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_smallest_p_of_pairs_is_what_unanimous_seeds_reach(num_seeds, smallest):
    found = permute(against_zero([-1.0 - 0.1 * seed for seed in range(num_seeds)]))

    assert found.smallest_p == found.p_value == smallest


def test_smallest_p_counts_the_relabellings():
    three_to_one = Pair(arm=(1.0, 2.0, 3.0), baseline=(4.0,))
    two_to_two = Pair(arm=(1.0, 2.0), baseline=(3.0, 4.0))

    assert permute({0: three_to_one, 1: three_to_one}).smallest_p == 1 / 16
    assert permute({0: two_to_two, 1: two_to_two}).smallest_p == 2 / 36
