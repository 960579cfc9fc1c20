"""A/A controls give the range of chance; positive controls show that a study can detect effects."""

import pytest

from src.study.analysis.analyse import analyse
from src.study.analysis.verdicts import INCONCLUSIVE
from tests.study import synthetic
from tests.study.remedies import FAILS, REMEDIES, SHAKEN, START, arm, everything_said
from tests.study.synthetic import Arm


def test_every_difference_has_the_range_of_the_aa_control():
    found = arm(analyse(synthetic.in_memory(REMEDIES)), "warmdown")

    assert found.aa_control == "shaken"
    # Shaken has 1, 2, 0, 1, 1, 1 non-finite batches where the baseline has 2, 1, 3, 1, 2, 1.
    assert found.comparisons["nonfinite_batches"].aa_range == (-3, 1)
    assert found.comparisons["nonfinite"].aa_range == pytest.approx((-1 / 6, -1 / 6))


def test_repeats_of_the_aa_control_widen_its_range():
    null = Arm(
        nonfinite=[steps for each in FAILS for steps in (each, [])], acts_from=START, repeats=2
    )
    arms = {
        "none": Arm(nonfinite=FAILS),
        "shaken": null,
        "fp32": Arm(nonfinite=FAILS, acts_from=START),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "fp32")

    assert found.comparisons["nonfinite"].aa_range == (-1, 0)


def test_the_range_of_the_aa_control_is_that_of_single_runs_inside_the_arms_own_window():
    null = Arm(spikes=[[100, 200], [100, 200, 300, 400, 420]], repeats=2)
    arms = {"none": Arm(), "shaken": null, "zclip": Arm(), "warmdown": Arm(acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "zclip").comparisons["spikes"].aa_range == (2, 5)
    assert arm(analysis, "warmdown").comparisons["spikes"].aa_range == (0, 3)


def test_the_aa_control_counts_the_seeds_at_risk_in_the_arms_own_window():
    arms = {
        "none": Arm(nonfinite=[[100], [], [], [], [], []]),
        "shaken": Arm(nonfinite=[[100, 300, 301], [], [], [], [], []]),
        "zclip": Arm(),
        "warmdown": Arm(acts_from=START),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "zclip").comparisons["nonfinite_batches"].aa_range == (0, 2)
    assert arm(analysis, "warmdown").comparisons["nonfinite_batches"].aa_range == (0, 0)


def test_an_aa_control_of_another_baseline_is_not_used():
    arms = {
        "none": Arm(),
        "shaken": Arm(),
        "clip03": Arm(),
        "sound": Arm(ffn="moe", stability=[], baseline=None),
        "sound_shaken": Arm(ffn="moe", stability=["shaken"], baseline="sound"),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "moe_writeup_add+clip03").aa_control == "moe_writeup_add+shaken"


def test_the_aa_control_that_begins_with_the_arm_is_taken():
    arms = REMEDIES | {"shaken_full": Arm(nonfinite=SHAKEN)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "clip03").aa_control == "shaken_full"
    assert arm(analysis, "warmdown").aa_control == "shaken"
    assert arm(analysis, "none").aa_control is None


def test_an_aa_control_is_never_a_finding_and_costs_the_others_nothing():
    late = Arm(acts_from=START)
    clean = {"none": Arm(num_failing=6), "shaken": late, "shaken_full": late, "router_eps": Arm()}

    analysis = analyse(synthetic.in_memory(clean))

    null = arm(analysis, "shaken").comparisons["nonfinite"]
    assert null.p_value == pytest.approx(2 * 2 / 924) and not null.detected
    assert null.verdict.startswith("A/A control: ")
    told = "shaken is an A/A control and is significantly different in nonfinite"
    assert any(told in warning for warning in analysis.warnings)
    cure = arm(analysis, "router_eps").comparisons["nonfinite"]
    assert cure.p_value == pytest.approx(2 / 924)
    assert "shaken" not in analysis.answer[1]


def test_if_the_positive_control_is_not_detected_no_remedy_can_be_ranked():
    arms = REMEDIES | {"router_eps": Arm(nonfinite=SHAKEN, acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert not analysis.can_rank
    assert analysis.answer[0] == (
        "Too few failures to rank remedies: even router_eps (5 of 6, against 11 of 12 untreated),"
        " the positive control, cannot be distinguished from chance."
    )


def test_one_detected_positive_control_is_enough():
    arms = REMEDIES | {"router_freeze": Arm(nonfinite=SHAKEN, acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert analysis.can_rank
    assert [each.label for each in analysis.arms if each.is_positive_control] == [
        "router_eps",
        "router_freeze",
    ]


def test_where_nothing_fails_nothing_can_be_prevented():
    primary = arm(analyse(synthetic.in_memory({"none": Arm(), "zclip": Arm()})), "zclip")

    verdict = primary.comparisons["nonfinite"].verdict
    assert verdict.startswith(INCONCLUSIVE) and "nothing could be prevented" in verdict


def test_a_positive_control_that_adds_failures_is_not_detected():
    arms = {"none": Arm(), "router_eps": Arm(num_failing=6)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "router_eps").comparisons["nonfinite"].detected
    assert not analysis.can_rank
    assert (
        "more runs fail with router_eps (6 of 6 fail), against 0 of 6 untreated"
        in analysis.answer[2]
    )


def test_a_study_without_a_positive_control_says_so_and_ranks():
    arms = {name: each for name, each in REMEDIES.items() if name != "router_eps"}

    analysis = analyse(synthetic.in_memory(arms))

    assert analysis.can_rank
    assert any(warning.startswith("no positive control") for warning in analysis.warnings)
    assert "no positive control" not in everything_said(analyse(synthetic.in_memory(REMEDIES)))


def test_of_two_baselines_the_one_without_a_detected_positive_control_is_named():
    arms = {
        "none": Arm(num_failing=6),
        "router_eps": Arm(),
        "sound": Arm(ffn="moe", stability=[], baseline=None),
        "sound_eps": Arm(ffn="moe", stability=["router_eps"], baseline="sound"),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert not analysis.can_rank
    assert analysis.answer[0].startswith("Too few failures to rank remedies against moe+none: ")
