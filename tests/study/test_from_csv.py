"""What a report writes a line a run is all that its statistics need."""

import pytest

from src.study.analysis.analyse import analyse, arm_results
from src.study.analysis.results import Analysis
from src.study.analysis.rows import arm_rows, run_rows, spans
from src.study.read.from_csv import rebuilt, steps_in
from src.study.report.make_report import read_csv, write_report
from tests.study import synthetic
from tests.study.pages import ARMS
from tests.study.synthetic import Arm


@pytest.mark.parametrize("steps", [[], [7], [7, 8], [1, 2, 3, 9, 11, 12], [5, 4]])
def test_steps_come_back_from_their_text(steps):
    assert steps_in(spans(steps)) == sorted(steps)


def test_the_text_of_steps_is_short():
    assert spans([274, *range(280, 441)]) == "274 280-440"


STUDIES = {
    "every kind": ARMS,
    "runs that the guard has ended by raising": {
        "none": Arm(num_failing=6, status="failed", config={"guard.on_nonfinite": "raise"}),
        "ema": Arm(),
    },
    "averages of weights": {"none": Arm(), "ema": Arm(acts_from=440)},
}


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_the_lines_of_runs_are_those_of_the_runs(name, tmp_path):
    study = synthetic.study(tmp_path, arms=STUDIES[name], seeds=6)
    write_report(study, tmp_path / "out", show=False)
    again = rebuilt(study.name, read_csv(tmp_path / "out" / "report.csv"))
    results = arm_results(again)
    analysis = Analysis(study=study.name, arms=results, answer=[], can_rank=True, warnings=[])
    assert arm_rows(again, analysis) == arm_rows(study, analyse(study))


def test_a_line_that_was_changed_changes_the_arms(tmp_path):
    study = synthetic.study(tmp_path, arms=ARMS, seeds=6)
    rows = [
        {k: "" if v is None else str(v) for k, v in row.items()}
        for row in run_rows(study, analyse(study))
    ]
    before = arm_results(rebuilt(study.name, rows))
    victim = next(row for row in rows if row["label"] == "router_eps")
    victim["nonfinite_steps"] = "300-310"
    after = arm_results(rebuilt(study.name, rows))
    assert before != after


def test_a_line_names_the_fields_in_which_runs_of_the_study_differ(tmp_path):
    rates = {"recipe.learning_rate": 0.003, "recipe.betas": [0.9, 0.99]}
    study = synthetic.study(tmp_path, arms={"none": Arm(), "ema": Arm(config=rates)}, seeds=2)
    found = {row["label"]: row["varied"] for row in run_rows(study, analyse(study))}
    assert found["none"] == "learning_rate=0.0015 betas=[0.9,0.95]"
    assert found["ema"] == "learning_rate=0.003 betas=[0.9,0.99]"
