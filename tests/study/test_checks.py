import dataclasses

import pytest

from src.study.analysis.analyse import analyse
from src.study.read.collect import Run, Study
from tests.study import synthetic
from tests.study.synthetic import Arm

CONTROLS = {"none": Arm(num_failing=6), "router_eps": Arm(), "shaken": Arm(num_failing=6)}


def warnings(arms, **kwargs) -> list[str]:
    return analyse(synthetic.in_memory(arms, **kwargs)).warnings


def recorded(study: Study, number: int, **entries) -> Study:
    """The study with other entries in one record."""
    runs = list(study.runs)
    runs[number] = with_entries(runs[number], **entries)
    return dataclasses.replace(study, runs=runs)


def with_entries(run: Run, **entries) -> Run:
    """The run, its metrics too, with other entries in its record."""
    changed = dataclasses.replace(run, record=run.record | entries)
    changed.__dict__["lines"] = run.lines
    return changed


def test_a_complete_study_warns_of_nothing():
    assert warnings(CONTROLS) == []


def test_a_study_of_remedies_without_controls_is_told_so():
    found = warnings({"none": Arm(num_failing=6), "clip03": Arm(num_failing=5)})

    assert found[0].startswith("no positive control") and found[1].startswith("no A/A control")
    assert len(found) == 2


def test_seeds_that_only_one_side_has_are_listed():
    found = warnings(CONTROLS | {"clip03": Arm(seeds=[0, 1, 2, 9])})

    assert "clip03: seeds 3, 4, 5 missing, but run in its baseline" in found
    assert "clip03: seed 9 not compared, because not run in its baseline" in found


def test_an_arm_whose_baseline_is_not_there_is_named():
    found = warnings({"none": Arm(seeds=[]), "clip03": Arm()})

    assert any("clip03: its baseline mlha+moe_writeup_add+none" in each for each in found)


@pytest.mark.parametrize("status", ["failed", "killed", "unfinished"])
def test_runs_that_have_not_ended_are_listed(status):
    found = warnings(CONTROLS | {"clip03": Arm(status=status)}, seeds=2)

    assert f"clip03: not compared, because {status}: seed-0, seed-1" in found


def test_runs_that_the_guard_stopped_have_lower_bounds_for_counts():
    found = warnings(CONTROLS | {"clip03": Arm(outcome="stopped", num_failing=6, steps=330)})

    assert any("clip03: stopped by the guard" in each and "seed-5" in each for each in found)


def test_seeds_that_failed_early_are_told_once_for_all_arms_that_start_there():
    early = [[100], [300], [300], [300], [300], [300]]
    arms = {
        "none": Arm(nonfinite=early),
        "router_eps": Arm(nonfinite=[[100], [], [], [], [], []], acts_from=240),
        "shaken": Arm(nonfinite=early, acts_from=240),
        "ema": Arm(nonfinite=early, acts_from=440),
    }

    (warning,) = [each for each in warnings(arms) if "seeds failed by step" in each]

    assert warning.startswith("router_eps, shaken: 1 of 6 seeds failed by step 240")


def test_mixed_code_libraries_and_devices_are_told():
    study = synthetic.in_memory(CONTROLS)
    assert (
        "runs of 2 commits (0123456789, abc)"
        in analyse(recorded(study, 3, git_sha="abc", code="d" * 16)).warnings
    )
    assert (
        "runs of 2 commits (0123456789, abc), all with the same code"
        in analyse(recorded(study, 3, git_sha="abc")).warnings
    )
    assert (
        "1 of 18 runs come from a checkout with uncommitted changes"
        in analyse(recorded(study, 3, git_dirty=True)).warnings
    )
    other = {"python": "3.11.7", "torch": "2.14.0"}
    assert (
        "runs of several versions of torch: 2.13.0+cpu, 2.14.0"
        in analyse(recorded(study, 3, versions=other)).warnings
    )
    device = {"type": "cuda", "name": "H100"}
    assert (
        "runs on several devices: H100, cpu" in analyse(recorded(study, 3, device=device)).warnings
    )


def test_metrics_that_are_cut_are_named_and_so_is_a_run_trained_by_two_states_of_the_code():
    study = synthetic.in_memory(CONTROLS, seeds=2)
    study.runs[1].__dict__["lines"] = study.runs[1].lines[:3]
    study.runs[0].__dict__["lines"] = []
    (cut,) = [line for line in analyse(study).warnings if "is truncated" in line]
    assert cut.startswith("none: metrics.jsonl is truncated")
    assert cut.endswith("seed-0 (to step 0 of 440), seed-1 (to step 80 of 440)")
    mixed = analyse(recorded(synthetic.in_memory(CONTROLS), 3, code="c" * 16 + "+d"))
    assert "runs of 2 versions of the code: it was changed between runs" in mixed.warnings


def test_of_runs_that_tell_no_code_nothing_is_said_of_it():
    study = synthetic.in_memory(CONTROLS)
    runs = [with_entries(run, code=None) for run in study.runs]

    older = recorded(dataclasses.replace(study, runs=runs), 3, git_sha="abc")

    assert analyse(older).warnings == ["runs of 2 commits (0123456789, abc)"]


def test_a_field_that_differs_without_being_named_is_told():
    odd = Arm(config={"recipe.learning_rate": 3e-3, "ffn.router.norm_eps": 1e-9})

    found = warnings(CONTROLS | {"zclip": odd})

    assert found == [
        "zclip: also differs from its baseline in ffn.router.norm_eps (1e-09, baseline 0.0),"
        " recipe.learning_rate (0.003, baseline 0.0015)"
    ]


@pytest.mark.parametrize(
    "arm",
    [
        # What the variant's name says, in the short and in the long form.
        Arm(fields="@learning_rate-0.003", config={"recipe.learning_rate": 3e-3}),
        Arm(fields="@recipe.learning_rate-0.003", config={"recipe.learning_rate": 3e-3}),
        Arm(fields="@bias_rate-4", config={"ffn.router.bias_rate": 4.0}),
        # What another option of a group brings with it.
        Arm(ffn="mlp", config={"ffn": {"inner_dim": 192}}),
        Arm(preset="hot", config={"recipe.betas": [0.9, 0.999]}),
        Arm(model="proxy", config={"model.hidden_dim": 128, "attention.q_latent_dim": 16}),
    ],
)
def test_a_field_that_differs_as_the_name_says_is_not_told(arm):
    assert warnings(CONTROLS | {"zclip": dataclasses.replace(arm, stability=["zclip"])}) == []


def test_what_an_option_claims_is_expected_to_differ_and_nothing_else():
    clipped = {"stability.clip03": {"norm": 0.3}, "recipe.clip_norm": 0.3}
    shorter = {"stability.beta2": {"beta2": 0.99}, "recipe.betas": [0.9, 0.99]}

    arms = CONTROLS | {"clip03": Arm(config=clipped), "beta2": Arm(config=shorter)}
    assert warnings(arms) == []
    also = Arm(config=clipped | {"recipe.weight_decay": 0.1})
    (told,) = warnings(CONTROLS | {"clip03": also})
    assert "recipe.weight_decay" in told and "clip_norm" not in told


def test_notes_of_records_are_told_once_an_arm():
    noted = Arm(record={"notes": ["stability=clip03 changes nothing here"]})

    assert warnings(CONTROLS | {"clip03": noted}) == [
        "clip03: stability=clip03 changes nothing here"
    ]
