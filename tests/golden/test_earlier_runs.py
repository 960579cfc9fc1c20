"""Runs of an earlier version are read, resumed, replayed and reported with equal numbers.

`earlier_runs.zip` holds what that version wrote: a study of two arms and two seeds with its report,
a run that was stopped after 6 of 12 steps beside the same run uninterrupted, and an incident.
"""

import csv
import json
import zipfile
from pathlib import Path

import pytest

from src import replay, report, train
from tests.conftest import TINY
from tests.runs import metrics, record

ARCHIVE = Path(__file__).with_name("earlier_runs.zip")

ACROSS_MACHINES = 1e-4
"""Relative: another processor rounds other last bits, which 12 steps do not grow."""


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "runs"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_runs_of_a_study_are_reported_with_equal_numbers(earlier):
    before = rows(earlier / "old" / "report" / "report.csv")
    (earlier / "old" / "report" / "report.csv").unlink()
    assert report.main(["study=old"]) == 0
    now = rows(earlier / "old" / "report" / "report.csv")
    # Columns have come since: the look at which a seed entered a sequential study, and the share of
    # validation tokens that are not finite.
    for column in ("look", "nonfinite_tokens"):
        assert [row.pop(column) for row in now] == [""] * len(before)
    assert now == before


def test_the_arms_of_a_study_have_equal_means(earlier):
    """Tests and what they count have changed since; means over the runs have not."""
    before = rows(earlier / "old" / "report" / "arms.csv")
    (earlier / "old" / "report" / "arms.csv").unlink()
    assert report.main(["study=old"]) == 0
    now = rows(earlier / "old" / "report" / "arms.csv")
    kept = [
        name
        for name in before[0]
        if name in now[0] and not name.endswith(("_p_value", "_smallest_p", "_effect", "_verdict"))
    ]
    assert {"variant", "num_seeds", "loss_mean", "loss_difference_mean", "spikes_mean"} <= set(kept)
    assert [[row[name] for name in kept] for row in now] == [
        [row[name] for name in kept] for row in before
    ]


def test_a_stopped_run_goes_on_to_the_numbers_of_one_that_was_not_stopped(earlier, shared_cache):
    (folder,) = (earlier / "stopped").glob("*/seed-0")
    (whole,) = (earlier / "whole").glob("*/seed-0")
    arguments = [*TINY, f"paths.cache={shared_cache}", "study=stopped", "stability=ema"]
    assert len(metrics(folder)) < len(metrics(whole))
    assert train.main(arguments) == 0
    resumed, expected = metrics(folder), metrics(whole)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected]
    for one, two in zip(resumed, expected, strict=True):
        # Counted since.
        assert one.pop("val/nonfinite_tokens", 0.0) == one.pop("val_ema/nonfinite_tokens", 0.0) == 0
        assert one == pytest.approx(two, rel=ACROSS_MACHINES, abs=1e-6)
    assert record(folder)["config_hash"] == record(whole)["config_hash"]


def test_an_incident_is_run_again_and_found_the_same(earlier, capsys):
    (incident,) = (earlier / "failed").glob("*/seed-0/incidents/step-6")
    recorded = json.loads((incident / "incident.json").read_text())
    assert replay.main([f"incident={incident}", "format=json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["alike"]
    for field in ("module", "operation", "num_nonfinite", "positions"):
        assert again["finding"][field] == recorded["finding"][field]
