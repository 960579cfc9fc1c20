import dataclasses
import math
import time

import numpy as np
import pytest

from src.study.analysis import analyse
from src.study.collect import Study
from src.study.compare import comparisons
from src.study.results import Analysis, ArmResult, Proportion
from src.study.variants import arms_of
from src.study.verdicts import CANNOT_TELL
from tests.study import synthetic
from tests.study.synthetic import Arm

START = 240

FAILS = [[380, 383], [301], [360, 361, 362], [351], [258, 300], [390]]
"""Non-finite steps of the baseline a seed: six of six, all after the landmark."""

SHAKEN = [[375], [302, 303], [], [355], [258], [391]]

REMEDIES = {
    "none": Arm(nonfinite=FAILS),
    "shaken": Arm(nonfinite=SHAKEN, acts_from=START),
    "router_eps": Arm(acts_from=START),
    "clip03": Arm(nonfinite=[*FAILS[1:], FAILS[0]]),
    "fp32": Arm(nonfinite=[*FAILS[2:], *FAILS[:2]], acts_from=START),
    "noise": Arm(nonfinite=SHAKEN, acts_from=START),
    "warmdown": Arm(nonfinite=[*FAILS[:3], [], [], []], acts_from=START),
    "early_stop": Arm(acts_from=280, steps=280),
}


def arm(analysis: Analysis, label: str) -> ArmResult:
    (found,) = [each for each in analysis.arms if each.label == label]
    return found


def everything_said(analysis: Analysis) -> str:
    verdicts = [c.verdict for each in analysis.arms for c in each.comparisons.values()]
    return "\n".join([*analysis.answer, *analysis.warnings, *verdicts])


def test_a_known_cure_is_found_with_six_seeds_after_holm():
    analysis = analyse(synthetic.in_memory(REMEDIES))

    primary = arm(analysis, "router_eps").comparisons["nonfinite"]
    # router_eps, clip03, fp32, noise and warmdown; the null arm and the censored one are apart.
    assert primary.p_value == pytest.approx(5 * 2 / 924)
    assert primary.detected and primary.smallest_p == primary.p_value
    assert primary.difference.mean == -1.0
    assert primary.verdict == "fewer seeds fail: 0 of 6 seeds against 6 of 6, p = 0.011"
    detected = [each.label for each in analysis.arms if "nonfinite" in each.comparisons]
    detected = [name for name in detected if arm(analysis, name).comparisons["nonfinite"].detected]
    assert detected == ["router_eps"]
    assert analysis.can_rank


def test_the_answer_says_what_fails_what_prevents_it_and_what_cannot_be_told():
    sentences = analyse(synthetic.in_memory(REMEDIES)).answer

    assert sentences[0] == (
        "With mlha and moe_writeup_add at preset stress: 6 of 6 seeds go non-finite, first at step"
        " 258 to 390."
    )
    assert (
        sentences[1] == "This is prevented by router_eps (0 of 6 seeds against 6 of 6), p = 0.011."
    )
    assert sentences[2].startswith("This design cannot tell")
    assert "warmdown (3 of 6)" in sentences[2] and "router_eps" not in sentences[2]
    assert "by chance alone 5 of 6 (shaken) seeds fail" in sentences[2]
    assert "early_stop after step 280; zeros there are exposure, not effect" in sentences[3]
    assert sentences[4:] == [
        "With 0 clean seeds of the baseline to pair with, loss by itself: router_eps 2.107."
    ]


def test_a_weak_effect_at_three_seeds_cannot_be_told():
    arms = {"none": Arm(num_failing=3), "router_eps": Arm(), "clip03": Arm(num_failing=1)}

    analysis = analyse(synthetic.in_memory(arms, seeds=3))

    for label in ("router_eps", "clip03"):
        for comparison in arm(analysis, label).comparisons.values():
            assert comparison.verdict.startswith(CANNOT_TELL) and not comparison.detected
            assert comparison.smallest_effect is None
    primary = arm(analysis, "router_eps").comparisons["nonfinite"]
    assert primary.smallest_p == pytest.approx(2 * 0.1)
    assert "cannot go below p = 0.200" in primary.verdict
    batches = arm(analysis, "router_eps").comparisons["nonfinite_batches"]
    assert batches.smallest_p == 0.25 and "cannot go below p = 0.250" in batches.verdict
    assert analysis.answer[0].startswith("This study cannot rank remedies")


def test_no_effect_is_never_said():
    for seeds in (1, 2, 3, 6):
        said = everything_said(analyse(synthetic.in_memory(REMEDIES, seeds=seeds)))
        assert "no effect" not in said.lower()
        assert CANNOT_TELL in said


def test_null_studies_are_not_found_more_often_than_they_should_be():
    num_studies, seeds = 1000, 6
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
    assert found.nonfinite == found.baseline_nonfinite == Proportion(events=4, total=4)
    assert found.first_nonfinite == [START + 1, 300, 300, 300]


def test_a_seed_whose_baseline_failed_before_is_apart_too():
    arms = {
        "none": Arm(nonfinite=[[100], *FAILS[1:]]),
        "router_eps": Arm(acts_from=START),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "router_eps")

    assert found.num_failed_before == 1 and found.nonfinite.total == 5
    assert found.baseline_nonfinite == Proportion(events=5, total=5)


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
    assert found.nonfinite == found.baseline_nonfinite == Proportion(events=0, total=5)
    assert primary.p_value is None and not primary.detected
    assert primary.verdict.startswith(f"{CANNOT_TELL}: censored")
    assert "exposure, not effect (5 of 5 seeds of its baseline fail" in primary.verdict


def test_an_option_beside_early_stop_is_compared_up_to_the_stop():
    arms = {
        "none": Arm(nonfinite=[[250], [260], [270], [280], [281], [300]]),
        "early_stop-warmdown": Arm(acts_from=START, steps=280),
    }

    found = arm(analyse(synthetic.in_memory(arms)), "early_stop-warmdown")

    assert found.baseline_nonfinite == Proportion(events=4, total=6)
    assert "up to step 280, after which it does not train" in found.comparisons["nonfinite"].verdict


def test_early_stop_is_compared_in_loss_at_its_own_last_step():
    arms = {"none": Arm(), "early_stop": Arm(acts_from=280, steps=280)}

    found = arm(analyse(synthetic.in_memory(arms)), "early_stop")

    # The synthetic curve is that of the baseline: at equal steps there is nothing between them.
    assert found.comparisons["loss"].difference.mean == pytest.approx(0, abs=1e-12)
    assert found.comparisons["loss"].verdict.endswith(
        "at step 280, its last, it is its baseline still"
    )
    assert found.loss.mean > arm(analyse(synthetic.in_memory(arms)), "none").loss.mean


def test_ema_is_compared_by_the_loss_of_averaged_weights_alone():
    arms = {"none": Arm(), "ema": Arm(acts_from=440)}

    found = arm(analyse(synthetic.in_memory(arms)), "ema")

    assert found.loss_metric == "val_ema/loss"
    assert found.comparisons["loss"].difference.mean == pytest.approx(-0.02)
    assert found.comparisons["loss"].p_value == 2 / 64
    primary = found.comparisons["nonfinite"]
    assert primary.p_value is None and "trains bitwise as its baseline" in primary.verdict


def test_the_range_of_the_null_arm_stands_beside_every_difference():
    found = arm(analyse(synthetic.in_memory(REMEDIES)), "warmdown")

    assert found.null_arm == "shaken"
    # Shaken has 1, 2, 0, 1, 1, 1 non-finite batches where the baseline has 2, 1, 3, 1, 2, 1.
    assert found.comparisons["nonfinite_batches"].null_range == (-3, 1)
    assert found.comparisons["nonfinite"].null_range == pytest.approx((-1 / 6, -1 / 6))


def test_repeats_of_the_null_arm_widen_its_range():
    null = Arm(
        nonfinite=[steps for each in FAILS for steps in (each, [])], acts_from=START, repeats=2
    )
    arms = {"none": Arm(nonfinite=FAILS), "shaken": null, "fp32": Arm(nonfinite=FAILS)}

    found = arm(analyse(synthetic.in_memory(arms)), "fp32")

    assert found.comparisons["nonfinite"].null_range == (-1, 0)


def test_the_range_of_the_null_arm_is_that_of_single_runs_inside_the_arms_own_window():
    null = Arm(spikes=[[100, 200], [100, 200, 300, 400, 420]], acts_from=START, repeats=2)
    arms = {"none": Arm(), "shaken": null, "zclip": Arm(), "warmdown": Arm(acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "zclip").comparisons["spikes"].null_range == (2, 5)
    assert arm(analysis, "warmdown").comparisons["spikes"].null_range == (0, 3)


def test_the_null_arm_stands_in_with_the_seeds_that_the_arms_own_window_has():
    arms = {
        "none": Arm(nonfinite=[[100], [], [], [], [], []]),
        "shaken": Arm(nonfinite=[[100, 300, 301], [], [], [], [], []], acts_from=START),
        "zclip": Arm(),
        "warmdown": Arm(acts_from=START),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "zclip").comparisons["nonfinite_batches"].null_range == (0, 2)
    assert arm(analysis, "warmdown").comparisons["nonfinite_batches"].null_range == (0, 0)


def test_a_null_arm_of_another_baseline_is_no_yardstick():
    arms = {
        "none": Arm(),
        "shaken": Arm(acts_from=START),
        "clip03": Arm(),
        "sound": Arm(ffn="moe", stability=[], baseline=None),
        "sound_shaken": Arm(ffn="moe", stability=["shaken"], baseline="sound"),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "moe_writeup_add+clip03").null_arm == "moe_writeup_add+shaken"


def test_the_null_arm_that_starts_nearest_is_taken():
    arms = REMEDIES | {"shaken_full": Arm(nonfinite=SHAKEN)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "clip03").null_arm == "shaken_full"
    assert arm(analysis, "warmdown").null_arm == "shaken"
    assert arm(analysis, "none").null_arm is None


def test_a_null_arm_is_never_a_finding_and_costs_the_others_nothing():
    clean = {"none": Arm(num_failing=6), "shaken": Arm(), "shaken_full": Arm(), "router_eps": Arm()}

    analysis = analyse(synthetic.in_memory(clean))

    null = arm(analysis, "shaken").comparisons["nonfinite"]
    assert null.p_value == pytest.approx(2 * 2 / 924) and not null.detected
    assert null.verdict.startswith("chance alone: ")
    assert any("shaken is a null arm and stands out in nonfinite" in w for w in analysis.warnings)
    cure = arm(analysis, "router_eps").comparisons["nonfinite"]
    assert cure.p_value == pytest.approx(2 / 924)
    assert "shaken" not in analysis.answer[1]


def test_without_the_known_good_arm_found_no_remedy_can_be_ranked():
    arms = REMEDIES | {"router_eps": Arm(nonfinite=SHAKEN, acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert not analysis.can_rank
    assert analysis.answer[0] == (
        "This study cannot rank remedies: what is known to work was not found, router_eps"
        " (5 of 6 seeds against 6 of 6, p = 1.000)."
    )


def test_ranking_hangs_on_router_eps_alone():
    arms = REMEDIES | {"router_freeze": Arm(nonfinite=SHAKEN, acts_from=START)}

    analysis = analyse(synthetic.in_memory(arms))

    assert analysis.can_rank
    assert [each.label for each in analysis.arms if each.is_known_good] == [
        "router_eps",
        "router_freeze",
    ]


def test_where_nothing_fails_nothing_can_be_prevented():
    primary = arm(analyse(synthetic.in_memory({"none": Arm(), "zclip": Arm()})), "zclip")

    verdict = primary.comparisons["nonfinite"].verdict
    assert verdict.startswith(CANNOT_TELL) and "nothing could be prevented" in verdict


def test_a_known_good_arm_that_makes_it_worse_is_not_found():
    arms = {"none": Arm(), "router_eps": Arm(num_failing=6)}

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "router_eps").comparisons["nonfinite"].detected
    assert not analysis.can_rank
    assert "made worse by router_eps (6 of 6 seeds against 0 of 6)" in analysis.answer[2]


def test_a_study_without_a_known_good_arm_says_so_and_ranks():
    arms = {name: each for name, each in REMEDIES.items() if name != "router_eps"}

    analysis = analyse(synthetic.in_memory(arms))

    assert analysis.can_rank
    assert any(warning.startswith("no known-good arm") for warning in analysis.warnings)
    assert "no known-good arm" not in everything_said(analyse(synthetic.in_memory(REMEDIES)))


def test_of_two_baselines_the_one_without_the_known_good_found_is_named():
    arms = {
        "none": Arm(num_failing=6),
        "router_eps": Arm(),
        "sound": Arm(ffn="moe", stability=[], baseline=None),
        "sound_eps": Arm(ffn="moe", stability=["router_eps"], baseline="sound"),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert not analysis.can_rank
    assert analysis.answer[0].startswith("This study cannot rank remedies against moe+none: ")


def test_repeats_of_a_seed_are_one_vote():
    # Seed by seed: three of three, two of three, one of three, none.
    votes = [[300], [310], [320], [300], [], [340], [], [300], [], [], [], []]
    arms = {"none": Arm(num_failing=4), "zclip": Arm(nonfinite=votes, repeats=3)}

    found = arm(analyse(synthetic.in_memory(arms, seeds=4)), "zclip")

    assert found.nonfinite == Proportion(events=2, total=4)
    assert found.first_nonfinite == [310, 300]
    assert found.nonfinite_batches.num_seeds == 4
    assert found.nonfinite_batches.mean == pytest.approx((1 + 2 / 3 + 1 / 3 + 0) / 4)
    assert (found.num_seeds, found.num_runs) == (4, 12)


def test_of_as_many_runs_with_as_without_the_first_decides():
    votes = [[300], [], [], [300]]
    arms = {"none": Arm(), "zclip": Arm(nonfinite=votes, repeats=2)}

    found = arm(analyse(synthetic.in_memory(arms, seeds=2)), "zclip")

    assert found.nonfinite == Proportion(events=1, total=2)
    assert found.first_nonfinite == [300]


def test_repeats_give_counts_a_finer_p_and_the_share_none():
    arms = {"none": Arm(num_failing=4), "zclip": Arm(repeats=3)}

    comparisons = arm(analyse(synthetic.in_memory(arms, seeds=4)), "zclip").comparisons

    assert comparisons["nonfinite_batches"].smallest_p == 1 / 4**4
    assert comparisons["nonfinite_batches"].p_value == 1 / 4**4
    assert comparisons["nonfinite"].p_value == pytest.approx(2 / 70)


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
    stated = "both are clean, and have a loss at its last step, on 1 of 6 seeds"
    assert loss.verdict == f"{CANNOT_TELL}: {stated}"


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


def test_losses_at_equal_cost_are_taken_from_the_curve():
    arms = {
        "none": Arm(),
        "cheap": Arm(attention="gqa", stability=[], flops_per_token=0.5e6),
    }

    analysis = analyse(synthetic.in_memory(arms))

    dear, cheap = analysis.arms
    assert cheap.label == "gqa"
    # With the FLOPs of all of the cheap arm the dear one has made half of its steps.
    assert cheap.loss_at_equal["active_flops"] == pytest.approx(cheap.loss.mean)
    assert dear.loss_at_equal["active_flops"] > dear.loss_at_equal["steps"] + 0.05
    assert cheap.loss_difference_at_equal["steps"] == pytest.approx(0, abs=1e-12)
    expected = cheap.loss_at_equal["active_flops"] - dear.loss_at_equal["active_flops"]
    assert cheap.loss_difference_at_equal["active_flops"] == pytest.approx(expected)
    assert dear.loss_difference_at_equal["steps"] is None
    assert cheap.active_flops == dear.active_flops / 2


def test_an_architecture_study_answers_in_losses():
    arms = {
        "none": Arm(),
        "mlp": Arm(ffn="mlp", stability=[], loss=(2.3, 2.32, 2.29)),
        "gqa": Arm(attention="gqa", stability=[], loss=(2.101, 2.139, 2.081, 2.121, 2.109, 2.091)),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert analysis.can_rank and analysis.warnings == []
    assert [each.label for each in analysis.arms] == [
        "mlha+moe_writeup_add",
        "mlha+mlp",
        "gqa+moe_writeup_add",
    ]
    (losses,) = [s for s in analysis.answer if s.startswith("Loss against the baseline")]
    assert "mlha+mlp +0.197" in losses and "gqa" not in losses


def test_an_endpoint_found_beside_the_primary_one_is_named():
    arms = {"none": Arm(num_failing=6, batches=40), "zclip": Arm(num_failing=6, batches=4)}

    (told,) = [s for s in analyse(synthetic.in_memory(arms)).answer if "cannot tell whether" in s]

    assert "p = 1.000; fewer non-finite batches with zclip, p = 0.031; fewer spikes with" in told


def test_baselines_come_first_then_the_order_of_the_sweep():
    arms = {
        "clip03": Arm(),
        "sound_eps": Arm(ffn="moe", stability=["router_eps"], baseline="sound"),
        "sound": Arm(ffn="moe", stability=[], baseline=None),
        "none": Arm(),
    }

    labels = [each.label for each in analyse(synthetic.in_memory(arms)).arms]

    assert labels == [
        "moe+none",
        "moe_writeup_add+none",
        "moe_writeup_add+clip03",
        "moe+router_eps",
    ]


def test_labels_take_fields_only_where_names_would_be_one():
    arms = {
        "none": Arm(),
        "slow": Arm(stability=[], fields="@learning_rate-0.0005"),
        "fast": Arm(stability=[], fields="@learning_rate-0.05"),
        "ema": Arm(fields="@learning_rate-0.05"),
    }

    labels = [each.label for each in analyse(synthetic.in_memory(arms)).arms]

    assert labels == ["none", "none@learning_rate-0.0005", "none@learning_rate-0.05", "ema"]
    rates = {name: arms[name] for name in ("slow", "fast")}
    assert [each.label for each in analyse(synthetic.in_memory(rates)).arms] == [
        "learning_rate-0.0005",
        "learning_rate-0.05",
    ]


def test_files_and_memory_give_the_same_analysis(tmp_path):
    assert analyse(synthetic.study(tmp_path, REMEDIES)) == analyse(synthetic.in_memory(REMEDIES))


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_study_of_one_or_two_seeds_is_analysed(seeds):
    analysis = analyse(synthetic.in_memory(REMEDIES, seeds=seeds))

    assert not analysis.can_rank and len(analysis.answer) <= 8
    assert arm(analysis, "none").loss is None
    assert not any(c.detected for each in analysis.arms for c in each.comparisons.values())


def test_runs_that_have_not_ended_are_counted_and_not_compared():
    arms = {
        "none": Arm(num_failing=6),
        "router_eps": Arm(status="killed"),
        "clip03": Arm(status="unfinished"),
        "zclip": Arm(status="failed", nonfinite=[[300]]),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "router_eps").outcomes == {"killed": 6}
    assert arm(analysis, "clip03").outcomes == {"unfinished": 6}
    for label in ("router_eps", "clip03", "zclip"):
        found = arm(analysis, label)
        assert found.num_seeds == 0 and found.nonfinite.total == 0
        assert found.comparisons["nonfinite"].verdict.startswith(CANNOT_TELL)
    assert math.isnan(arm(analysis, "clip03").tokens)
    assert not analysis.can_rank


def test_a_run_that_the_guard_ended_by_raising_is_a_failure_and_counts():
    arms = {
        "none": Arm(status="failed", nonfinite=[[300]], config={"guard.on_nonfinite": "raise"}),
        "router_eps": Arm(config={"guard.on_nonfinite": "raise"}),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "router_eps").baseline_nonfinite == Proportion(events=6, total=6)
    assert analysis.can_rank


def test_studies_with_nothing_in_them_are_analysed():
    empty = synthetic.in_memory({})
    assert analyse(empty).answer == ["No run of this study has ended yet."]
    unfinished = analyse(synthetic.in_memory({"none": Arm(status="unfinished")}))
    assert unfinished.answer == ["No run of this study has ended yet."]
    orphan = synthetic.in_memory({"none": Arm(seeds=[]), "clip03": Arm(num_failing=2)})
    found = arm(analyse(orphan), "clip03")
    assert found.nonfinite == Proportion(events=2, total=6) and found.baseline_nonfinite is None
    bare = synthetic.in_memory({"none": Arm(), "clip03": Arm()})
    stripped = [dataclasses.replace(run, record={"status": "finished"}) for run in bare.runs]
    analyse(dataclasses.replace(bare, runs=stripped))


def test_two_hundred_runs_take_less_than_two_seconds():
    names = [f"lower_lr{number}" for number in range(20)]
    arms = {name: Arm(stability=["lower_lr"], fields=f"@factor-{name}") for name in names}
    study = synthetic.in_memory({"none": Arm(num_failing=8)} | arms, seeds=10)
    assert len(study.runs) == 210

    begin = time.perf_counter()
    analyse(study)

    assert time.perf_counter() - begin < 2
