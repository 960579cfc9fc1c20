"""Public failures under four tools: each is judged as the page says, and the page is current."""

import csv
from dataclasses import replace

import pytest
import torch
from transformers.debug_utils import DebugUnderflowOverflow

from src.lab.detector import run_detector
from src.lab.detector.compare_tools import TOOLS, Report, compare_tools, judge_report, plain_name
from src.lab.detector.public_cases.case_list import PUBLIC_CASES
from src.lab.detector.public_table import TOOL_NAMES, PublicTable, mark
from tests.runs import ROOT, lab

FILE = ROOT / "experiments" / "detector" / "public.csv"
BY_NAME = {case.name: case for case in PUBLIC_CASES}
SQRT = BY_NAME["HalfTurn"]
RIGHT = Report(
    step=7,
    named="SqrtBackward0",
    operation="SqrtBackward0",
    module="",
    lines=("usual = torch.sqrt(trace + 1.0) / 2",),
    cause="outside the domain",
)


def test_the_results_in_the_book_are_of_these_cases():
    table = PublicTable.read(FILE)
    assert [row["case"] for row in table.rows] == list(BY_NAME)
    assert set(TOOL_NAMES) == set(TOOLS)
    for row in table.rows:
        case = BY_NAME[row["case"]]
        assert row["source"] == case.model.source
        assert row["expected_line"] == (case.line or "")
        assert row["expected_cause"] == case.cause


# Of the first, detect_anomaly sees nothing; the second and third fail in the backward pass; the
# fourth fails in a module of torch; the last fails in the plain loop by itself.
@pytest.mark.parametrize(
    "name", ["SquashedActor", "HalfTurn", "GradientPenalty", "SpectralZero", "Procrustes"]
)
def test_a_case_gives_its_row_in_the_book(name):
    (row,) = [row for row in PublicTable.read(FILE).rows if row["case"] == name]
    again = compare_tools(BY_NAME[name])
    assert {key: "" if value is None else str(value) for key, value in again.items()} == row


def judged(tool: str, report: Report | None, case=SQRT) -> tuple[str, str, str, str]:
    found = judge_report(case, TOOLS[tool], report, failing_step=7)
    return found.detected, found.place, found.line, found.cause


def test_each_tool_is_judged_by_what_it_can_name():
    assert judged("nonfinite", RIGHT) == ("yes", "yes", "yes", "yes")
    assert judged("detect_anomaly", RIGHT) == ("yes", "yes", "yes", "none")
    assert judged("underflow_overflow", RIGHT) == ("yes", "yes", "none", "none")
    assert judged("plain_loop", RIGHT) == ("yes", "none", "none", "none")
    assert judged("nonfinite", None) == ("no", "no", "no", "no")


@pytest.mark.parametrize(("step", "word"), [(6, "early"), (8, "late")])
def test_a_report_of_another_step_names_nothing_right(step, word):
    assert judged("nonfinite", replace(RIGHT, step=step)) == (word, "no", "no", "no")


def test_the_operation_counts_on_the_guilty_line_only():
    elsewhere = replace(RIGHT, lines=("other = torch.sqrt(1 + a)",))
    assert judged("detect_anomaly", elsewhere) == ("yes", "no", "no", "none")
    another = replace(RIGHT, operation="DivBackward0")
    assert judged("detect_anomaly", another) == ("yes", "no", "yes", "none")
    assert judged("underflow_overflow", replace(RIGHT, module="net"))[1] == "no"


def test_what_has_no_right_answer_is_not_asked():
    update = BY_NAME["ZeroBias"]
    assert judged("nonfinite", RIGHT, update)[1:3] == ("-", "-")
    # The loss function stands outside the model; its line can be named, but no module.
    outside = BY_NAME["Entropy"]
    assert judged("underflow_overflow", RIGHT, outside)[1] == "-"
    assert judged("detect_anomaly", RIGHT, outside)[1] == "no"


def test_names_of_an_operation_agree():
    names = ("torch.Tensor.__pow__", "PowBackward0", "torch.pow")
    assert {plain_name(name) for name in names} == {"pow"}
    assert plain_name("LogSoftmaxBackward0") == plain_name("torch.nn.functional.log_softmax")


def test_keywords_hide_nothing_that_is_bad():
    for case in PUBLIC_CASES:
        assert all(tensor.isfinite().all() for batch in case.batches for tensor in batch)
    model, _ = BY_NAME["SmoothedLabels"].build()
    DebugUnderflowOverflow(model)
    x, y, blocked = BY_NAME["SmoothedLabels"].batches[0]
    with pytest.raises(NotImplementedError, match="Bool"):
        model(x, y, blocked)
    model(x=x, y=y, blocked=blocked)


def test_a_mark_says_what_was_right():
    rows = {row["case"]: row for row in PublicTable.read(FILE).rows}
    assert mark(rows["HalfTurn"], "nonfinite") == "step, operation, line, cause"
    assert mark(rows["HalfTurn"], "underflow_overflow") == "late, step 8 for 7"
    assert mark(rows["SquashedActor"], "detect_anomaly") == "not noticed"
    assert mark(rows["SquashedActor"], "underflow_overflow") == "step, module"


def test_the_summary_counts_the_rows():
    table = PublicTable.read(FILE)
    for name, *counts in table.summary():
        (tool,) = [tool for tool, known in TOOL_NAMES.items() if known == name]
        assert sum(map(int, counts[:4])) == len(PUBLIC_CASES)
        with_line = sum(case.line is not None for case in PUBLIC_CASES)
        asked = TOOLS[tool].names_line
        assert counts[5].endswith(f" of {with_line}" if asked else "never named")


def test_the_public_part_runs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_detector, "PUBLIC_CASES", [BY_NAME["NoInstance"]])
    threads = torch.get_num_threads()
    assert lab("detect")(["only=public", "out=book"]) == 0
    assert torch.get_num_threads() == threads and not torch.is_anomaly_enabled()
    assert [file.name for file in (tmp_path / "book").iterdir()] == ["public.csv"]
    with open("book/public.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["nonfinite_detected"] == "yes" and row["detect_anomaly_detected"] == "no"
    assert "1 of 1" in capsys.readouterr().out
