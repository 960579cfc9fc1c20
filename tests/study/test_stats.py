import itertools
import math
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats as scipy_stats

from src.study.analysis import multiple_testing, stats
from src.study.analysis.permutation import Pair, max_t, smallest_max_t_p
from src.study.analysis.results import Proportion

DIFFERENCES = [-41.0, 12.0, -118.0, -3.0, -70.0, -28.0]


def of(events: int, total: int) -> Proportion:
    return Proportion(events=events, total=total)


def pairs(arm, baseline) -> dict[int, Pair]:
    """One run a side and seed."""
    return {
        seed: Pair(arm=(one,), baseline=(two,))
        for seed, (one, two) in enumerate(zip(arm, baseline, strict=True))
    }


def against_zero(differences) -> dict[int, Pair]:
    return pairs(differences, [0.0] * len(differences))


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

    with pytest.raises(ValueError, match="evenly spaced in the logarithm"):
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
