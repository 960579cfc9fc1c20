"""Studies of every shape are analysed: architectures, few seeds, runs that have not ended."""

import dataclasses
import math
import time

import pytest

from src.study.analysis.analyse import analyse
from src.study.analysis.results import Proportion
from src.study.analysis.verdicts import INCONCLUSIVE
from tests.study import synthetic
from tests.study.remedies import REMEDIES, arm
from tests.study.synthetic import Arm


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

    analysis = analyse(synthetic.in_memory(arms, seeds=8))

    assert analysis.can_rank and analysis.warnings == []
    assert [each.label for each in analysis.arms] == [
        "mlha+moe_writeup_add",
        "mlha+mlp",
        "gqa+moe_writeup_add",
    ]
    assert analysis.answer[0] == "All 24 runs stay finite."
    higher, unknown = analysis.answer[1:]
    assert higher.startswith("Significantly higher loss than the baseline: mlha+mlp +0.195")
    assert unknown.startswith(
        "No significant difference from the baseline's loss: gqa+moe_writeup_add "
    )


def test_two_seeds_are_said_to_be_too_few_for_any_difference():
    arms = {"none": Arm(), "clip03": Arm(loss=(2.0, 2.04))}

    (finite, unknown) = analyse(synthetic.in_memory(arms, seeds=2)).answer

    assert finite.startswith("All 4 runs stay finite")
    assert unknown.startswith("Loss minus the baseline's, with 2 seeds, too few to tell: clip03 ")
    assert "p = " not in unknown
    assert "For an answer type the same command with 6 seeds or more" in unknown


def test_an_endpoint_found_beside_the_primary_one_is_named():
    arms = {"none": Arm(num_failing=6, batches=40), "zclip": Arm(num_failing=6, batches=4)}

    (said,) = [s for s in analyse(synthetic.in_memory(arms)).answer if "zclip" in s]

    assert said.startswith(
        "It does not prevent even half of the failures: zclip (6 of 6 fail), against"
    )
    assert "; fewer non-finite batches with zclip, p = 0.031; fewer spikes with" in said


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
        assert found.comparisons["nonfinite"].verdict.startswith(INCONCLUSIVE)
    assert math.isnan(arm(analysis, "clip03").tokens)
    assert not analysis.can_rank


def test_a_run_that_the_guard_ended_by_raising_is_a_failure_and_counts():
    arms = {
        "none": Arm(status="failed", nonfinite=[[300]], config={"guard.on_nonfinite": "raise"}),
        "router_eps": Arm(config={"guard.on_nonfinite": "raise"}),
    }

    analysis = analyse(synthetic.in_memory(arms))

    assert arm(analysis, "router_eps").untreated_nonfinite == Proportion(events=6, total=6)
    assert analysis.can_rank


def test_studies_with_nothing_in_them_are_analysed():
    empty = synthetic.in_memory({})
    assert analyse(empty).answer == ["No run of this study has ended yet."]
    unfinished = analyse(synthetic.in_memory({"none": Arm(status="unfinished")}))
    assert unfinished.answer == ["No run of this study has ended yet."]
    orphan = synthetic.in_memory({"none": Arm(seeds=[]), "clip03": Arm(num_failing=2)})
    found = arm(analyse(orphan), "clip03")
    assert found.nonfinite == Proportion(events=2, total=6) and found.untreated_nonfinite is None
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
