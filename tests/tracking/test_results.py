"""What MLflow shows of a sweep is what the report says of it."""

import csv
import json
import shutil

import pytest

from src.train import main
from tests.conftest import TINY
from tests.runs import record
from tests.tracking.folders import query

COLUMNS = {
    "val_loss": "loss",
    "val_nonfinite_frac": "nonfinite_frac",
    "val_nonfinite_tokens": "nonfinite_tokens",
    "nonfinite_steps": "nonfinite_batches",
    "first_nonfinite_step": "first_nonfinite",
    "skipped_steps": "skipped_steps",
    "spikes": "spikes",
    "grad_norm_max": "grad_norm_max",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
}
"""Columns of the report's report.csv by their names in MLflow."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, template, shared_cache):
    """A sweep whose baseline carries the average for ema."""
    folder = tmp_path_factory.mktemp("sweep")
    database = shutil.copy(template, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["--multirun", *TINY, "stability=clip03,ema", "study=a", "tracking=mlflow"]
        arguments += [f"tracking.uri=sqlite:///{database}", f"paths.cache={shared_cache}"]
        assert main(arguments) == 0
    return folder


def in_mlflow(place, option):
    """The last value of each metric of an arm's run."""
    rows = query(
        place / "mlflow.db",
        "select m.key, m.value from latest_metrics m join runs using (run_uuid)"
        f" where name like '%+{option}@%'",
    )
    assert len(dict(rows)) == len(rows) > 0
    return dict(rows)


def run_folder(place, option):
    (found,) = (place / "runs" / "a").glob(f"*+{option}@*/seed-0")
    return found


@pytest.mark.parametrize("option", ["none", "clip03", "ema"])
def test_mlflow_and_the_report_say_the_same_of_an_arm(place, option):
    stored = in_mlflow(place, option)
    summary = {k.partition("/")[2]: v for k, v in stored.items() if k.startswith("result/")}
    with (place / "runs" / "a" / "report" / "report.csv").open(encoding="utf-8") as stream:
        (row,) = [row for row in csv.DictReader(stream) if row["stability"] == option]
    reported = {name: row[column] for name, column in COLUMNS.items() if row[column]}
    assert {name: float(text) for name, text in reported.items()} == {
        name: value for name, value in summary.items() if name in COLUMNS
    }
    assert summary.keys() - COLUMNS.keys() == {"tokens_per_second"}
    (headline,) = query(
        place / "mlflow.db",
        f"select value from latest_metrics where key = 'report/{option}/val_loss'",
    )
    assert headline == (summary["val_loss"],)


def test_a_baseline_shows_nothing_of_the_average_that_it_carries(place):
    folder = run_folder(place, "none")
    stored, made = in_mlflow(place, "none"), record(folder)
    shown = [*stored, *made["final"], *made["best"]]
    assert [name for name in shown if "ema" in name] == []
    assert stored["result/val_loss"] == made["final"]["val/loss"]
    # The arm that begins from this run takes its own beginning from these lines.
    assert "val_ema/loss" in (folder / "metrics.jsonl").read_text()


def test_an_averaged_arm_is_judged_by_its_average_from_the_first_validation_on(place):
    folder = run_folder(place, "ema")
    stored, final = in_mlflow(place, "ema"), record(folder)["final"]
    assert stored["result/val_loss"] == final["val_ema/loss"] != final["val/loss"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val/loss" in line]
    assert all("val_ema/loss" in line for line in validated)


def test_no_metric_is_a_copy_of_the_last_value_of_another(place):
    for option in ("none", "clip03", "ema"):
        groups = {name.partition("/")[0] for name in in_mlflow(place, option)}
        assert groups.isdisjoint({"final", "best"})
