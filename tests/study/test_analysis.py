"""What is compared, and what is said of it."""

import dataclasses
import math

import numpy as np
import pytest

from src.study.analysis.analyse import analyse
from src.study.analysis.arms import arms_of
from src.study.analysis.compare_arms import comparisons
from src.study.analysis.results import Proportion
from src.study.analysis.verdicts import INCONCLUSIVE
from src.study.read.collect import Study
from tests.study import synthetic
from tests.study.remedies import FAILS, REMEDIES, START, arm, everything_said
from tests.study.synthetic import Arm


def test_a_known_cure_is_found_with_six_seeds_after_holm():
    analysis = analyse(synthetic.in_memory(REMEDIES))

    primary = arm(analysis, "router_eps").comparisons["nonfinite"]
    # router_eps, clip03, fp32, noise and warmdown, without the A/A control and the censored arm. Of
    # three runs of a seed one is the arm's. In five seeds both others fail, in one only one.
    assert primary.p_value == pytest.approx(5 * 2 / 3**6)
    assert primary.detected and primary.smallest_p == 1 / 3**6
    assert primary.difference.mean == pytest.approx(-11 / 12)
    assert primary.verdict == "fewer runs fail: 0 of 6, untreated 11 of 12, p = 0.014"
    detected = [each.label for each in analysis.arms if "nonfinite" in each.comparisons]
    detected = [name for name in detected if arm(analysis, name).comparisons["nonfinite"].detected]
    assert detected == ["router_eps"]
    assert analysis.can_rank


def test_the_answer_says_what_fails_what_prevents_it_and_what_is_inconclusive():
    sentences = analyse(synthetic.in_memory(REMEDIES)).answer

    assert sentences[0] == (
        "With mlha and moe_writeup_add at preset stress: 6 of 6 runs go non-finite, first at step"
        " 258 to 390; repeated untreated, 5 of 6 (A/A control shaken)."
    )
    assert sentences[1] == (
        "Significantly fewer runs fail with router_eps (0 of 6 fail), against 11 of 12 untreated,"
        " p = 0.014."
    )
    assert sentences[2] == (
        "These do not prevent even half of the failures: clip03 (6 of 6 fail), against 6 of 6"
        " untreated; fp32 (6 of 6 fail), against 11 of 12 untreated; if one of them did, so many"
        " would fail with a chance of at most 1.1 %."
    )
    assert sentences[3].startswith("Cannot tell whether fewer runs fail with")
    assert "warmdown (3 of 6)" in sentences[3] and "router_eps" not in sentences[3]
    assert "early_stop after step 280; zero failures there only reflect fewer" in sentences[4]
    assert sentences[5:] == [
        "Mean loss with router_eps 2.107; not compared, because no seed of the baseline stayed"
        " finite."
    ]


def test_a_weak_effect_at_three_seeds_is_inconclusive():
    arms = {"none": Arm(num_failing=3), "router_eps": Arm(), "clip03": Arm(num_failing=1)}

    analysis = analyse(synthetic.in_memory(arms, seeds=3))

    for label in ("router_eps", "clip03"):
        for comparison in arm(analysis, label).comparisons.values():
            assert comparison.verdict.startswith(INCONCLUSIVE) and not comparison.detected
            assert comparison.smallest_effect is None
    primary = arm(analysis, "router_eps").comparisons["nonfinite"]
    assert primary.smallest_p == pytest.approx(0.1)
    assert "no difference can be significant: add seeds, or an A/A control" in primary.verdict
    batches = arm(analysis, "router_eps").comparisons["nonfinite_batches"]
    assert batches.smallest_p == 0.25 and "no difference can be significant" in batches.verdict
    assert analysis.answer[0].startswith(
        "Too few failures to rank remedies: even router_eps (0 of 3"
    )
    assert analysis.answer[0].endswith(" Run at least 5 seeds: 'seed=range(5)'.")


def test_no_effect_is_never_said():
    for seeds in (1, 2, 3, 6):
        said = everything_said(analyse(synthetic.in_memory(REMEDIES, seeds=seeds)))
        assert "no effect" not in said.lower()
        assert INCONCLUSIVE in said


@pytest.mark.parametrize("num_studies", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_null_studies_are_not_found_more_often_than_they_should_be(num_studies):
    seeds = 8
    names = ("none", "clip03", "noise", "warmdown", "zclip")
    study = synthetic.in_memory({name: Arm() for name in names}, seeds=seeds)
    generator = np.random.default_rng(0)
    hits = dict.fromkeys(("nonfinite", "nonfinite_batches", "first_nonfinite", "loss"), 0)
    for _ in range(num_studies):
        chance, level = generator.uniform(0.2, 0.8, seeds), generator.normal(2.1, 0.1, seeds)
        # The part of `analyse` that decides, without what is said about it.
        found = comparisons(arms_of(_drawn(study, generator, chance, level))).values()
        for endpoint in hits:
            hits[endpoint] += any(each[endpoint].detected for each in found)

    # Five in a hundred, and two and a half standard errors.
    ceiling = num_studies * 0.05 + 2.5 * math.sqrt(num_studies * 0.05 * 0.95)
    assert max(hits.values()) <= ceiling
    # That something is found at all: a test that never rejects is no test.
    assert hits["first_nonfinite"] > 0


def _drawn(study: Study, generator, chance, level) -> Study:
    """The study with failures and losses that no arm has a part in."""
    runs = []
    for run in study.runs:
        fails = generator.random() < chance[run.seed]
        first = int(generator.integers(100, 400))
        steps = list(range(first, first + int(generator.integers(1, 40)))) if fails else []
        loss = level[run.seed] + generator.normal(0, 0.05)
        record = run.record | {
            "guard": {"nonfinite_steps": steps},
            "final": {"val/loss": loss, "val/nonfinite_frac": 0.0},
        }
        runs.append(dataclasses.replace(run, record=record))
    return dataclasses.replace(study, runs=runs)


def test_seeds_that_failed_before_the_arm_acts_are_apart():
    # A step is the last of the shared beginning, the next is the first that the arm changes.
    early = [[START], [START + 1], [50, 300], [300], [300], [300]]
    arms = {"none": Arm(nonfinite=early), "warmdown": Arm(nonfinite=early, acts_from=START)}

    found = arm(analyse(synthetic.in_memory(arms)), "warmdown")

    assert found.num_failed_before == 2
    assert found.nonfinite == found.untreated_nonfinite == Proportion(events=4, total=4)
    assert found.first_nonfinite == [START + 1, 300, 300, 300]


def test_a_seed_whose_baseline_failed_before_is_apart_too():
    arms = {
        "none": Arm(nonfinite=[[100], *FAILS[1:]]),
        "router_eps": Arm(acts_from=START),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "router_eps")

    assert found.num_failed_before == 1 and found.nonfinite.total == 5
    assert found.untreated_nonfinite == Proportion(events=5, total=5)


def test_events_before_the_landmark_are_no_part_of_any_count():
    arms = {
        "none": Arm(spikes=[[100, 200, 300]]),
        "warmdown": Arm(spikes=[[100, 200, 250, 300]], acts_from=START),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "warmdown").spikes.mean == 2
    assert arm(analysis, "warmdown").comparisons["spikes"].difference.mean == 1
    assert arm(analysis, "none").spikes.mean == 3


def test_zeros_of_early_stop_are_exposure():
    analysis = analyse(synthetic.in_memory(REMEDIES))

    found = arm(analysis, "early_stop")
    primary = found.comparisons["nonfinite"]
    assert found.censored_at == 280
    # One seed of the baseline, the fifth, failed at 258.
    assert found.num_failed_before == 1
    assert found.nonfinite == Proportion(events=0, total=5)
    assert found.untreated_nonfinite == Proportion(events=0, total=10)
    assert primary.p_value is None and not primary.detected
    assert primary.verdict.startswith(f"{INCONCLUSIVE}: censored")
    assert "not an effect of the remedy (9 of 10 untreated runs fail" in primary.verdict


def test_what_the_guard_raised_out_of_is_an_event_and_no_early_stop():
    raising = {"guard.on_nonfinite": "raise"}
    arms = {
        "none": Arm(nonfinite=[[250]], steps=249, status="failed", config=raising),
        "early_stop-warmdown": Arm(
            acts_from=START, nonfinite=[[250]], steps=250, status="failed", config=raising
        ),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "early_stop-warmdown")

    assert found.censored_at is None
    assert found.nonfinite == Proportion(events=6, total=6)


def test_an_option_beside_early_stop_is_compared_up_to_the_stop():
    arms = {
        "none": Arm(nonfinite=[[250], [260], [270], [280], [281], [300]]),
        "early_stop-warmdown": Arm(acts_from=START, steps=280),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "early_stop-warmdown")

    assert found.untreated_nonfinite == Proportion(events=4, total=6)
    assert "up to step 280, where training ends" in found.comparisons["nonfinite"].verdict


def test_an_arm_that_ends_early_reaches_no_equal_cost_by_any_clock():
    slow = Arm(acts_from=280, steps=280, tokens_per_second=1_000.0)

    found = arm(analyse(synthetic.in_memory({"none": Arm(), "early_stop": slow})), "early_stop")

    assert set(found.loss_at_equal.values()) == {None}
    assert set(found.loss_difference_at_equal.values()) == {None}


def test_early_stop_is_compared_in_loss_at_its_own_last_step():
    arms = {"none": Arm(), "early_stop": Arm(acts_from=280, steps=280)}

    found = arm(analyse(synthetic.in_memory(arms)), "early_stop")

    # The synthetic curve is that of the baseline: at equal steps there is nothing between them.
    assert found.comparisons["loss"].difference.mean == pytest.approx(0, abs=1e-12)
    assert found.comparisons["loss"].verdict.endswith(
        "up to step 280, its last, the arm is identical to its baseline"
    )
    assert found.loss.mean > arm(analyse(synthetic.in_memory(arms)), "none").loss.mean


def test_ema_is_compared_by_the_loss_of_averaged_weights_alone():
    arms = {"none": Arm(), "ema": Arm(acts_from=440)}

    found = arm(analyse(synthetic.in_memory(arms)), "ema")

    assert found.loss_metric == "val_ema/loss"
    assert found.comparisons["loss"].difference.mean == pytest.approx(-0.02)
    assert found.comparisons["loss"].p_value == 2 / 64
    primary = found.comparisons["nonfinite"]
    assert primary.p_value is None and "trains bitwise identically" in primary.verdict


def test_every_run_of_a_seed_counts():
    # Seed by seed: three of three, two of three, one of three, none.
    runs = [[300], [310], [320], [300], [], [340], [], [300], [], [], [], []]
    arms = {"none": Arm(num_failing=4), "zclip": Arm(nonfinite=runs, repeats=3)}

    found = arm(analyse(synthetic.in_memory(arms, seeds=4)), "zclip")

    assert found.nonfinite == Proportion(events=6, total=12)
    assert found.first_nonfinite == [300, 310, 320, 300, 340, 300]
    assert found.nonfinite_batches.num_seeds == 4
    assert found.nonfinite_batches.mean == pytest.approx((1 + 2 / 3 + 1 / 3 + 0) / 4)
    assert (found.num_seeds, found.num_runs) == (4, 12)


def test_repeats_give_a_finer_p():
    arms = {"none": Arm(num_failing=4), "zclip": Arm(repeats=3)}

    comparisons = arm(analyse(synthetic.in_memory(arms, seeds=4)), "zclip").comparisons

    assert comparisons["nonfinite_batches"].smallest_p == 1 / 4**4
    assert comparisons["nonfinite_batches"].p_value == 1 / 4**4
    # Four failures among sixteen runs, all of them untreated.
    assert comparisons["nonfinite"].p_value == pytest.approx(1 / math.comb(16, 4))


def test_runs_of_the_matching_aa_control_are_untreated_runs():
    shaken = Arm(num_failing=6, acts_from=START, repeats=3)
    arms = {
        "none": Arm(num_failing=6),
        "shaken": shaken,
        "warmdown": Arm(acts_from=START),
        "early": Arm(stability=["zclip"]),
    }

    analysis = analyse(synthetic.in_memory(arms))

    late, early = (arm(analysis, label) for label in ("warmdown", "zclip"))
    assert late.untreated_nonfinite.total == 24
    # It begins before the A/A control, whose runs are the baseline's until then.
    assert early.untreated_nonfinite.total == 6 and early.aa_control is None
    assert late.comparisons["nonfinite"].p_value < 2 / 5**6 + 1e-9


def test_repeats_of_a_late_arm_need_a_control_that_begins_with_it():
    arms = {
        "none": Arm(num_failing=6),
        "shaken_full": Arm(num_failing=6, repeats=3),
        "noise": Arm(acts_from=START, repeats=3),
        "warmdown": Arm(acts_from=START),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "noise").aa_control is None
    assert arm(analysis, "warmdown").aa_control == "shaken_full"


def test_correlation_within_a_seed_widens_the_interval():
    alike = [steps for steps in ([300], [], [300], [], [300], []) for _ in range(3)]
    apart = [[300], [], [], [], [300], [300], [300], [], [], [], [300], [300], [300], [], [], []]
    apart += [[300], [300]]

    def width(runs):
        arms = {
            "none": Arm(nonfinite=[[300], [], [300], [], [300], []]),
            "shaken": Arm(nonfinite=runs, repeats=3),
            "zclip": Arm(num_failing=3),
        }
        found = arm(analyse(synthetic.in_memory(arms)), "zclip")
        difference = found.comparisons["nonfinite"].difference
        return found.failure_correlation, difference.high - difference.low

    (one, wide), (other, narrow) = width(alike), width(apart)
    assert one == pytest.approx(1.0) and other < 0.3
    assert wide > narrow


def test_losses_are_compared_on_seeds_of_which_both_are_clean():
    arms = {
        "none": Arm(nonfinite=[[], [], [], [], [300], []]),
        "zclip": Arm(nonfinite=[[300], [], [], [], [], []], loss=(9.0, 2.2, 2.2, 2.2, 9.0, 2.2)),
    }

    analysis = analyse(synthetic.in_memory(arms))

    found = arm(analysis, "zclip")
    assert found.loss.num_seeds == 5
    assert found.comparisons["loss"].difference.num_seeds == 4
    expected = np.mean([2.2 - 2.14, 2.2 - 2.08, 2.2 - 2.12, 2.2 - 2.09])
    assert found.comparisons["loss"].difference.mean == pytest.approx(expected)


def test_fewer_than_two_clean_seeds_give_no_difference_of_losses():
    arms = {"none": Arm(num_failing=5), "zclip": Arm()}

    loss = arm(analyse(synthetic.in_memory(arms)), "zclip").comparisons["loss"]

    assert loss.difference is None and loss.p_value is None
    stated = "arm and baseline are both clean, with a loss at the arm's last step, on 1 of 6 seeds"
    assert loss.verdict == f"{INCONCLUSIVE}: {stated}"


def test_a_loss_over_the_windows_that_are_left_is_marked_and_not_compared():
    arms = {"none": Arm(), "zclip": Arm(nonfinite_frac=0.25)}

    found = arm(analyse(synthetic.in_memory(arms)), "zclip")

    assert found.num_marked == 6
    assert found.loss is None and found.comparisons["loss"].difference is None
    assert arm(analyse(synthetic.in_memory(arms)), "none").num_marked == 0


def test_time_to_the_first_failure_is_the_whole_window_without_one():
    arms = {"none": Arm(nonfinite=[[300]]), "warmdown": Arm(acts_from=START)}

    found = arm(analyse(synthetic.in_memory(arms)), "warmdown").comparisons["first_nonfinite"]

    assert found.difference.mean == (440 - START) - (300 - START - 1)
    assert found.p_value == 2 / 64 and found.verdict.startswith("a later first non-finite batch")


def test_the_share_of_non_finite_tokens_is_compared_whatever_the_batch():
    shares = {"none": Arm(num_failing=6, nonfinite_frac=0.5), "zclip": Arm(nonfinite_frac=0.1)}

    found = arm(analyse(synthetic.in_memory(shares)), "zclip").comparisons["nonfinite_tokens"]

    assert found.difference.mean == pytest.approx(0.05 - 0.25)
    assert found.p_value == 2 / 64
    assert found.verdict.startswith("fewer non-finite validation tokens, by 0.200")


def test_runs_that_did_not_count_tokens_are_not_compared_by_them():
    arms = {
        "none": Arm(num_failing=6, counts_tokens=False),
        "zclip": Arm(counts_tokens=False),
    }
    found = arm(analyse(synthetic.in_memory(arms)), "zclip")
    assert "nonfinite_tokens" not in found.comparisons
