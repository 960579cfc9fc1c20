import json

import pytest

from src.study.read.collect import Run, Study
from src.study.report.branches import branches, branches_table


def run(tmp_path, stability, repeat, *, bad, step=20, acts_from=20, name="@fork-20"):
    variant = f"mlha+moe_writeup+{stability}{name}"
    return Run(
        folder=tmp_path / variant / f"seed-3-repeat-{repeat}",
        variant=variant,
        seed=3,
        repeat=repeat,
        config={
            "choices": dict.fromkeys(("attention", "ffn", "model", "preset"), "x"),
            "stability": {option: {} for option in stability.split("-")},
        },
        record={
            "status": "finished",
            "acts_from": acts_from,
            "derived_from": {"run": "single/base/seed-3", "step": step},
            "guard": {"nonfinite_steps": bad},
        },
        baseline=None,
    )


def study(tmp_path, runs):
    return Study(name="forks", folder=tmp_path, runs=runs, sweeps=[])


def test_repeats_without_a_failure_after_the_state_are_compared_with_the_aa_controls(tmp_path):
    runs = [
        # A failure before the state is the source's and counts for nothing.
        *(run(tmp_path, "clip03-shaken_full", r, bad=[5]) for r in range(4)),
        *(run(tmp_path, "shaken_full", r, bad=[5, 30]) for r in range(3)),
        run(tmp_path, "shaken_full", 3, bad=[]),
    ]
    control, treated = branches(study(tmp_path, runs))
    assert (control.is_aa_control, control.finite.events, control.finite.total) == (True, 1, 4)
    assert (treated.finite.events, treated.finite.total) == (4, 4)
    assert treated.control_finite == control.finite
    # Fisher's exact test of 4 of 4 against 1 of 4, by hand: (1 + 1 + ... ) = 2 * 4 / 56.
    assert treated.p_value is not None
    assert abs(treated.p_value - 1 / 7) < 1e-12
    table = branches_table(study(tmp_path, runs), title="t")
    assert [cell.text for cell in table.rows[1]][2:4] == ["4 of 4", "1 of 4"]


def test_runs_that_share_steps_with_their_baseline_are_not_branches(tmp_path):
    assert branches(study(tmp_path, [run(tmp_path, "warmdown", 0, bad=[], name="")])) == []


@pytest.mark.parametrize(("bad", "noted"), [([], True), ([5, 20], True), ([21], False)])
def test_a_source_that_did_not_fail_is_noted(bad, noted, tmp_path):
    source = tmp_path / "single" / "base" / "seed-3"
    source.mkdir(parents=True)
    (source / "record.json").write_text(json.dumps({"guard": {"nonfinite_steps": bad}}))
    forks = Study(
        name="forks",
        folder=tmp_path / "forks",
        runs=[run(tmp_path, "clip03", 0, bad=[])],
        sweeps=[],
    )
    (row,) = branches_table(forks, title="t").rows
    assert ("there was no failure to prevent" in row[1].plain) == noted


def test_without_aa_controls_nothing_is_compared(tmp_path):
    (line,) = branches(study(tmp_path, [run(tmp_path, "clip03", 0, bad=[])]))
    assert line.control_finite is None
    assert line.p_value is None
