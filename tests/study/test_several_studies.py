"""python -m src.report 'studies=[a,b]': arms of several studies side by side."""

import csv
from dataclasses import replace

import pytest

from src.report import main
from tests.study import synthetic
from tests.study.synthetic import Arm


@pytest.fixture(scope="module")
def two_studies(tmp_path_factory):
    """One in which router_eps helps, and one in which it does not and an arm is missing."""
    folder = tmp_path_factory.mktemp("studies")
    one = {"none": Arm(num_failing=8), "shaken_full": Arm(num_failing=8), "router_eps": Arm()}
    synthetic.study(folder, one | {"clip03": Arm(num_failing=8)}, seeds=8, name="one")
    two = {"none": Arm(), "shaken_full": Arm(), "router_eps": Arm(loss=(2.3, 2.34, 2.28))}
    synthetic.study(folder, two, seeds=8, name="two")
    return folder


def test_each_arm_stands_beside_itself_in_the_other_study(two_studies, monkeypatch, capsys):
    monkeypatch.chdir(two_studies)
    assert main(["studies=[one,two]"]) == 0

    said = capsys.readouterr().out
    assert "one: Significantly fewer runs fail with router_eps (0 of 8 fail)" in said
    assert "two: All 24 runs stay finite" in said
    with (two_studies / "comparison" / "arms.csv").open() as file:
        rows = {(row["study"], row["arm"]): row for row in csv.DictReader(file)}
    assert set(rows) == {
        *(("one", arm) for arm in ("none", "shaken_full", "router_eps", "clip03")),
        *(("two", arm) for arm in ("none", "shaken_full", "router_eps")),
    }
    assert rows["one", "router_eps"]["failing_runs"] == "0"
    assert rows["one", "router_eps"]["untreated_failing_runs"] == "16"
    assert float(rows["one", "router_eps"]["p_value"]) < 0.05
    assert float(rows["two", "router_eps"]["loss_difference"]) == pytest.approx(0.19, abs=0.05)
    page = (two_studies / "comparison" / "report.html").read_text()
    assert "<h1>one and two</h1>" in page
    assert "Runs that go non-finite, by arm and study" in page
    assert "Validation loss minus the baseline&#39;s, by arm and study" in page
    assert "untreated 16 of 16" in page


def test_losses_lead_where_nothing_fails_and_settings_that_differ_are_named(
    tmp_path, monkeypatch, capsys
):
    arms = {"none": Arm(), "router_eps": Arm(loss=(2.3, 2.34, 2.28))}
    synthetic.study(tmp_path, arms, name="short")
    longer = {name: replace(arm, max_steps=880) for name, arm in arms.items()}
    synthetic.study(tmp_path, longer, name="long")
    monkeypatch.chdir(tmp_path)
    assert main(["studies=[short,long]"]) == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "The studies differ in recipe.max_steps: an arm may do something else" in said
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "difference in the final validation loss" in page
    assert "difference in the share of failing runs" not in page
    assert page.index("Validation loss minus") < page.index("Runs that go non-finite")
    assert "Settings in which the studies differ" in page


def test_studies_with_equal_settings_are_not_said_to_differ(two_studies, monkeypatch, capsys):
    monkeypatch.chdir(two_studies)
    assert main(["studies=[one,two]"]) == 0
    assert "differ in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["study=[one,two]"],
            "study=[one,two]: is one study; type 'studies=[one,two]' for several",
        ),
        (["studies=[one]"], "must name two studies or more"),
        (["studies=one"], "studies=one: must be a list"),
        (["studies=[one,three]"], "study=three: has no runs"),
        (["studies=[one,two]", "study=one"], "name one of study=NAME, studies=[NAME,NAME]"),
    ],
)
def test_what_cannot_be_compared_is_one_line(two_studies, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(two_studies)
    assert main([*arguments, "out=elsewhere"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (two_studies / "elsewhere").exists()
