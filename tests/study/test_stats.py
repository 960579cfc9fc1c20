import math
from statistics import stdev

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src.study.analysis import multiple_testing, stats
from src.study.analysis.permutation import max_t
from src.study.analysis.results import Proportion
from tests.study.test_permutation import DIFFERENCES, against_zero, pairs


def of(events: int, total: int) -> Proportion:
    return Proportion(events=events, total=total)


def test_interval_is_that_of_scipys_t_test():
    found = stats.interval(DIFFERENCES)
    ends = scipy_stats.ttest_1samp(DIFFERENCES, 0.0).confidence_interval(0.95)

    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.mean == pytest.approx(np.mean(DIFFERENCES))
    assert found.num_seeds == 6


def test_one_seed_has_an_interval_of_no_width_and_none_has_none():
    one = stats.interval([2.5])

    assert (one.mean, one.low, one.high, one.num_seeds) == (2.5, 2.5, 2.5, 1)
    assert stats.interval([]) is None


@pytest.mark.parametrize(
    ("arm", "baseline", "low", "high"),
    [
        # Newcombe 1998, table II, method 10.
        (of(56, 70), of(48, 80), 0.0524, 0.3339),
        (of(9, 10), of(3, 10), 0.1705, 0.8090),
        (of(10, 10), of(0, 20), 0.6791, 1.0),
    ],
)
def test_interval_of_a_difference_of_shares_is_the_published_one(arm, baseline, low, high):
    found = stats.share_difference(arm, baseline)

    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_interval_of_shares_has_width_where_all_seeds_agree():
    found = stats.share_difference(of(0, 6), of(6, 6))

    assert found.mean == found.low == -1.0
    # Wilson's bound of none of n is z^2 / (n + z^2), and so far from the other side for all.
    z_squared = scipy_stats.norm.ppf(0.975) ** 2
    assert found.high == pytest.approx(math.sqrt(2) * z_squared / (6 + z_squared) - 1)
    assert stats.share_difference(of(0, 0), of(6, 6)) is None


def test_fisher_of_all_against_none():
    # Two of the C(12, 6) = 924 ways to place six failures.
    assert stats.fisher(of(0, 6), of(6, 6)) == pytest.approx(2 / 924)
    assert stats.fisher(of(3, 6), of(3, 6)) == 1.0


def test_holm_is_that_of_r():
    # p.adjust(c(.01, .04, .03, .005), "holm")
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})

    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_smallest_fisher_p_is_all_against_none():
    assert stats.smallest_fisher_p(6) == pytest.approx(0.00216, abs=1e-5)
    assert stats.smallest_fisher_p(3) == pytest.approx(0.1)


def test_smallest_share_is_the_first_that_fisher_calls():
    # 1 of 6 against 6 of 6 has p = .0152, 2 of 6 has .061.
    assert stats.smallest_share(of(6, 6), num_seeds=6) == pytest.approx(5 / 6)
    assert stats.smallest_share(of(6, 6), num_seeds=6, others=(1.0,) * 3) == 1.0
    assert stats.smallest_share(of(2, 6), num_seeds=6) is None
    assert stats.smallest_share(of(3, 3), num_seeds=3) is None


@pytest.mark.parametrize("untreated", [9, 10])
# One arm is found, as in a study of the book; none is; all are.
@pytest.mark.parametrize("observed", [[0, 10, 6, 8, 9], [10] * 5, [0, 0, 1, 1, 2]])
def test_what_an_arm_could_have_shown_is_what_the_whole_test_gives_for_it(untreated, observed):
    baseline = of(untreated, 10)
    arms = {f"arm{i}": (of(k, 10), baseline) for i, k in enumerate(observed * 2)}
    for name, tested in multiple_testing.shares(arms).items():
        again = [
            multiple_testing.shares(arms | {name: (of(k, 10), baseline)})[name] for k in range(11)
        ]
        found = [k for k, each in enumerate(again) if each.detected and k < untreated]
        assert tested.smallest_effect == pytest.approx((untreated - max(found)) / 10)
        if untreated == 10:
            assert tested.smallest_p == again[0].p_value


def test_smallest_effect_is_found_eight_times_of_ten():
    effect = stats.smallest_standardized_effect(6)
    samples = np.random.default_rng(0).normal(loc=effect, size=(20_000, 6))

    found = scipy_stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05

    # Three standard errors.
    assert np.mean(found) == pytest.approx(0.8, abs=0.009)


def test_smallest_effect_is_in_the_units_of_the_differences():
    effect = stats.smallest_mean_effect(DIFFERENCES)

    assert effect == pytest.approx(stats.smallest_standardized_effect(6) * stdev(DIFFERENCES))
    assert stats.smallest_mean_effect([1.0, 1.0]) is None
    assert stats.smallest_mean_effect([1.0]) is None


def test_lr_sensitivity_counts_a_diverged_run_as_the_initial_loss():
    losses = {1e-3: 2.0, 1e-2: 2.5, 1e-1: None, 1.0: math.inf}

    assert stats.lr_sensitivity(losses, initial_loss=4.0) == pytest.approx(
        (2 + 2.5 + 4 + 4) / 4 - 2
    )


def test_lr_sensitivity_caps_a_loss_above_the_initial_one():
    assert stats.lr_sensitivity({1e-3: 2.0, 1e-2: 9.0}, initial_loss=4.0) == 1.0
    assert stats.lr_sensitivity({}, initial_loss=4.0) is None


def test_lr_sensitivity_refuses_a_grid_that_is_not_logarithmic():
    stats.lr_sensitivity({3e-4: 2.0, 1e-3: 2.0, 3e-3: 2.0}, initial_loss=4.0)

    with pytest.raises(ValueError, match="evenly spaced on a log scale"):
        stats.lr_sensitivity({1e-3: 2.0, 2e-3: 2.0, 3e-3: 2.0}, initial_loss=4.0)


def test_an_arm_too_small_to_reject_costs_the_others_nothing():
    able = against_zero([-1.0, -1.2, -0.4, -2.0, -0.7, -1.6])
    # Its two seeds agree so well that under half of all patterns it stands above the able arm.
    unable = against_zero([5.0, 5.01])

    found = multiple_testing.means({"able": able, "unable": unable})

    assert found["able"].p_value == 2 / 64
    assert found["unable"].p_value >= 0.5
    assert max_t({"able": able, "unable": unable})["able"] > 0.05


def test_no_effect_is_small_enough_where_no_p_is():
    five = multiple_testing.means({"a": against_zero([-1.0, -2.0, -3.0, -1.0, -2.0])})["a"]

    assert five.smallest_p == 0.0625
    assert five.smallest_effect is None and not five.detected


NUM_STUDIES = 1000

CEILING = 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / NUM_STUDIES)

"""Five in a hundred, and two and a half standard errors of so many studies."""


def test_fisher_and_holm_find_nothing_in_null_studies():
    generator = np.random.default_rng(0)
    found = raw = 0
    for _ in range(NUM_STUDIES):
        # Twelve seeds, each failing half the time: where Fisher's test is nearest to its level.
        baseline, *counts = generator.binomial(12, 0.5, size=9)
        arms = {str(n): (of(int(c), 12), of(int(baseline), 12)) for n, c in enumerate(counts)}
        found += any(tested.detected for tested in multiple_testing.shares(arms).values())
        raw += any(stats.fisher(*arm) <= stats.ALPHA for arm in arms.values())

    assert found / NUM_STUDIES <= CEILING
    # The same studies without Holm: this test can fail.
    assert raw / NUM_STUDIES > CEILING


@pytest.mark.parametrize("kind", ["losses", "counts"])
def test_max_t_finds_nothing_in_null_studies(kind):
    generator = np.random.default_rng(1)
    found = raw = 0
    for _ in range(NUM_STUDIES):
        baseline, *arms = (
            generator.normal(size=(9, 8)) + generator.normal(size=8)
            if kind == "losses"
            # Counts of batches: most seeds fail, some of them a hundred times as long as others.
            else np.floor(generator.lognormal(2.5, 1.5, size=(9, 8)))
            * (generator.random((9, 8)) < 0.8)
        )
        family = {str(n): pairs(arm, baseline) for n, arm in enumerate(arms)}
        found += any(tested.detected for tested in multiple_testing.means(family).values())
        alone = [max_t({name: family[name]})[name] for name in "01"]
        raw += min(alone) <= stats.ALPHA

    assert found / NUM_STUDIES <= CEILING
    # Two of the eight arms, each by itself.
    assert raw / NUM_STUDIES > CEILING


def test_max_t_still_finds_an_effect_among_null_arms():
    generator = np.random.default_rng(2)
    found = false = 0
    for _ in range(200):
        baseline = generator.normal(size=6)
        family = {str(n): pairs(generator.normal(size=6), baseline) for n in range(6)}
        family["cure"] = pairs(generator.normal(size=6) - 6, baseline)
        tested = multiple_testing.means(family)
        found += tested.pop("cure").detected
        false += any(each.detected for each in tested.values())

    assert found >= 180
    assert false / 200 <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 200)
