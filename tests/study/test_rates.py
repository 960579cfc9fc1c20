"""How the loss hangs on the learning rate."""

import dataclasses
import math

import pytest

from src.common.number_format import NONE
from src.study.analysis import rates
from src.study.analysis.analyse import analyse
from src.study.report import chart_data
from src.study.report.sections import Findings
from tests.study import synthetic
from tests.study.pages import report
from tests.study.synthetic import Arm

GUESS = math.log(59)


def arm(rate: float, *losses: float, **fields) -> Arm:
    return Arm(
        stability=[],
        loss=losses,
        fields=f"@learning_rate-{rate:g}",
        config={"recipe.learning_rate": rate},
        **fields,
    )


def swept(**fields) -> dict[str, Arm]:
    return {
        "low": arm(1e-3, 2.5, 2.7, **fields),
        "middle": arm(1e-2, 2.1, 2.1, **fields),
        "high": arm(1e-1, 3.0, 3.2, outcome="collapsed", **fields),
    }


def only(arms: dict[str, Arm], seeds: int = 2) -> rates.Family:
    (family,) = rates.families(synthetic.in_memory(arms, seeds=seeds))
    return family


def test_sensitivity_is_the_mean_over_rates_minus_the_best_seed_by_seed():
    family = only(swept())
    assert family.rates == [1e-3, 1e-2, 1e-1]
    assert family.best == 1e-2
    # A run that collapsed counts as a uniform guess, whatever its loss.
    each = [(2.5 + 2.1 + GUESS) / 3 - 2.1, (2.7 + 2.1 + GUESS) / 3 - 2.1]
    assert family.sensitivity.mean == pytest.approx(sum(each) / 2)
    assert family.sensitivity.num_seeds == 2


def test_a_loss_with_non_finite_windows_counts_as_a_guess_and_one_without_as_itself():
    damaged = swept() | {"low": arm(1e-3, 2.5, num_failing=1)}
    assert only(damaged).mean_loss(1e-3) == pytest.approx((GUESS + 2.5) / 2)
    recovered = swept() | {"low": arm(1e-3, 2.5, num_failing=1, nonfinite_frac=0.0)}
    assert only(recovered).mean_loss(1e-3) == pytest.approx(2.5)


def test_a_loss_above_a_uniform_guess_counts_as_one():
    worse = swept() | {"high": arm(1e-1, GUESS + 2.0, 3.0)}
    assert only(worse).mean_loss(1e-1) == pytest.approx((GUESS + 3.0) / 2)


def test_seeds_without_every_rate_are_left_out_of_the_sensitivity():
    arms = swept() | {"low": arm(1e-3, 2.5, seeds=[1])}
    assert only(arms, seeds=3).sensitivity.num_seeds == 1


def test_two_rates_are_no_study_of_rates():
    arms = swept()
    del arms["high"]
    assert rates.families(synthetic.in_memory(arms)) == []


def test_variants_that_differ_in_more_than_the_rate_are_families_of_their_own():
    arms = {f"{key}-gqa": a for key, a in swept(attention="gqa").items()} | swept()
    found = rates.families(synthetic.in_memory(arms, seeds=2))
    assert [family.label for family in found] == ["gqa", "mlha"]


def test_the_table_says_where_seeds_fail_and_why_there_is_no_figure(tmp_path):
    arms = swept() | {"low": arm(2e-3, 2.5, num_failing=1)}
    _, page = report(synthetic.study(tmp_path, arms, seeds=2), tmp_path)
    (row,) = page.table("Learning rates")
    assert row[1].split("|")[1] == "0.002 to 0.1"
    assert row[2] == "1 of 2, 0 of 2, 0 of 2"
    assert row[3:5] == ["0.01", "2.100"]
    assert row[5] == f"{NONE}|rates are not evenly spaced on a log scale"


def test_a_best_rate_at_the_end_of_the_grid_and_a_rate_that_has_not_ended_are_said(tmp_path):
    arms = swept() | {"low": arm(1e-3, 2.0), "more": arm(1.0, 2.0, status="killed", steps=9)}
    _, page = report(synthetic.study(tmp_path, arms, seeds=2), tmp_path)
    (row,) = page.table("Learning rates")
    assert row[3] == "0.001|at the end of the grid"
    assert row[5] == f"{NONE}|some rate has no run that has ended"


def test_where_no_rate_has_a_loss_none_is_best(tmp_path):
    arms = {
        key: arm(a.config["recipe.learning_rate"], 2.0, num_failing=2) for key, a in swept().items()
    }
    _, page = report(synthetic.study(tmp_path, arms, seeds=2), tmp_path)
    (row,) = page.table("Learning rates")
    assert row[3:] == [NONE, NONE, f"{NONE}|no rate has a loss"]


def points_of(study, families):
    facts = Findings(study=study, analysis=analyse(study), folder=study.folder).facts
    return chart_data.learning_rates(families, facts)


def test_the_chart_has_a_point_a_run_and_is_a_file_too(tmp_path):
    study = synthetic.study(tmp_path, swept(), seeds=2)
    points = points_of(study, rates.families(study))
    assert sorted(points["run"].dropna()) == sorted(run.name for run in study.runs)
    # Beside each other, and nearer to their own rate than to any other.
    runs = points[points["part"] == "run"]
    assert runs["rate"].nunique() == 6
    assert (runs["rate"] / runs["at"].astype(float)).between(0.5, 2).all()
    files, _ = report(study, tmp_path)
    assert (files.page.parent / "figures" / "learning-rate.svg").is_file()


def test_families_have_a_panel_each_with_the_first_behind_them():
    study = synthetic.in_memory(swept(), seeds=2)
    (family,) = rates.families(study)
    found = [dataclasses.replace(family, label=f"option {n}") for n in range(5)]
    points = points_of(study, found)
    assert list(dict.fromkeys(points["panel"])) == [f"option {n}" for n in range(5)]
    lines = points.groupby("part")["panel"].nunique()
    assert dict(lines) == {"first": 4, "mean": 5, "run": 5}
