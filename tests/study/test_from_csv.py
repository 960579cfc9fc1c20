"""What a report writes a line a run is all that its statistics need."""

import dataclasses

import pandas as pd
import pytest

from src.study.analysis.analyse import analyse, arm_results
from src.study.analysis.frames import arms_frame, runs_frame, spans
from src.study.analysis.results import Analysis
from src.study.read.from_csv import read_frame, rebuilt, steps_in, write_frame
from src.study.report.make_report import write_report
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
    again = rebuilt(study.name, read_frame(tmp_path / "out" / "report.csv"))
    results = arm_results(again)
    analysis = Analysis(study=study.name, arms=results, answer=[], can_rank=True, warnings=[])
    pd.testing.assert_frame_equal(
        arms_frame(again, analysis), arms_frame(study, analyse(study)), check_exact=True
    )


def test_looks_come_back_from_the_lines_of_a_sequential_study(tmp_path):
    arms = {
        "none": Arm(num_failing=12),
        "shaken_full": Arm(num_failing=12, first=310),
        "router_eps": Arm(seeds=range(6)),
        "clip_value": Arm(num_failing=8),
    }
    study = synthetic.in_memory(arms, seeds=12)
    looks = [list(range(size)) for size in (3, 6, 12)]
    study = dataclasses.replace(study, looks=dict.fromkeys(study.variants, looks))
    write_frame(runs_frame(study, analyse(study)), tmp_path / "report.csv")
    again = rebuilt(study.name, read_frame(tmp_path / "report.csv"))
    assert again.looks == study.looks
    p_values = [
        {arm.label: each.p_value for arm in arm_results(s) for each in arm.comparisons.values()}
        for s in (again, study)
    ]
    assert p_values[0] == p_values[1]


def test_a_line_that_was_changed_changes_the_arms(tmp_path):
    study = synthetic.study(tmp_path, arms=ARMS, seeds=6)
    runs = runs_frame(study, analyse(study))
    before = arm_results(rebuilt(study.name, runs))
    runs.loc[runs.index[runs["label"] == "router_eps"][0], "nonfinite_steps"] = "300-310"
    after = arm_results(rebuilt(study.name, runs))
    assert before != after


def test_a_line_names_the_fields_in_which_runs_of_the_study_differ(tmp_path):
    rates = {"recipe.learning_rate": 0.003, "recipe.betas": [0.9, 0.99]}
    study = synthetic.study(tmp_path, arms={"none": Arm(), "ema": Arm(config=rates)}, seeds=2)
    found = runs_frame(study, analyse(study)).drop_duplicates("label").set_index("label")["varied"]
    assert found["none"] == "learning_rate=0.0015 betas=[0.9,0.95]"
    assert found["ema"] == "learning_rate=0.003 betas=[0.9,0.99]"


def test_a_frame_comes_back_from_its_file_bit_by_bit(tmp_path):
    hashes = {"variant": ["0123", "1e5"], "code": ["5", None]}
    values = {
        "seed": [1000, 1001],
        "loss": [0.1 + 0.2, None],
        "first": [None, 300],
        "p": [1.0, 2.0],
    }
    frame = pd.DataFrame(hashes | values, dtype=object)
    write_frame(frame, tmp_path / "frame.csv")
    again = read_frame(tmp_path / "frame.csv")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert [type(value) for value in again["first"]] == [type(None), int]
    assert (tmp_path / "frame.csv").read_text().splitlines()[2] == "1e5,,1001,,300,2.0"
