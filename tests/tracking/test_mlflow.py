"""MLflow as users have it: a process of its own, because mlflow behaves otherwise under pytest."""

import json
import shutil
import sqlite3
import subprocess
import sys

import pytest

from src.tracking.folder import read_metrics
from tests.conftest import TINY
from tests.runs import metrics, start

WITH_MLFLOW = [argument for argument in TINY if argument != "tracking=local"]


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An empty database, made once: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    code = (
        f"from src.tracking.mirror import prepare;prepare('sqlite:///{folder}/mlflow.db', 'single')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    return folder / "mlflow.db"


def finish(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def query(database, sql):
    with sqlite3.connect(database) as connection:
        return connection.execute(sql).fetchall()


def test_a_run_stands_in_mlflow_with_all_its_metrics_and_training_is_the_same(template, tmp_path):
    shutil.copy(template, tmp_path / "mlflow.db")
    code, _, err = finish(start("train", ["stability=ema", "study=a", *WITH_MLFLOW], tmp_path))
    assert (code, err) == (0, "")
    database = tmp_path / "mlflow.db"
    ((name, status),) = query(database, "select name, status from runs")
    (folder,) = (tmp_path / "runs" / "a").glob("*/seed-0")
    assert name == f"{folder.parent.name}/seed-0"
    assert status == "FINISHED"
    stored = query(database, "select key, step, value from metrics")
    lines = read_metrics(folder / "metrics.jsonl")
    expected = {(k, line["step"], v) for line in lines for k, v in line.items() if k != "step"}
    assert expected <= set(stored)
    record = json.loads((folder / "record.json").read_text())
    latest = dict(query(database, "select key, value from latest_metrics"))
    assert latest["final/val/loss"] == record["final"]["val/loss"]
    assert latest["best/step"] == record["best"]["step"]
    tags = dict(query(database, "select key, value from tags"))
    params = dict(query(database, "select key, value from params"))
    for axis, value in {"attention": "mlha", "stability": "ema", "seed": "0"}.items():
        assert tags[axis] == params[axis] == value
    assert (tags["outcome"], tags["baseline"]) == ("clean", "false")
    assert tags["incident"] == "none"
    assert tags["version.torch"] == record["versions"]["torch"]
    assert tags["config_hash"] == record["config_hash"]
    assert params["recipe.learning_rate"] == "0.005"
    artifacts = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert artifacts == {"config.yaml", "record.json", "samples.md"}
    # Trackers on or off: equal.
    local = ["stability=ema", "study=b", *TINY]
    assert finish(start("train", local, tmp_path))[0] == 0
    (other,) = (tmp_path / "runs" / "b").glob("*/seed-0")
    assert metrics(other) == metrics(folder)


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(template, tmp_path):
    shutil.copy(template, tmp_path / "mlflow.db")
    arguments = ["study=a", *WITH_MLFLOW]
    assert finish(start("train", arguments, tmp_path))[0] == 0
    (folder,) = (tmp_path / "runs" / "a").glob("*/seed-0")
    (folder / "record.json").unlink()
    assert finish(start("train", arguments, tmp_path))[0] == 0
    assert query(tmp_path / "mlflow.db", "select status from runs") == [("FINISHED",)]


def test_a_server_that_is_away_is_named_and_training_goes_on(tmp_path):
    process = start(
        "train", ["study=a", *WITH_MLFLOW], tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    code, _, err = finish(process)
    assert code == 0
    assert err.startswith("warning: MLflow at http://127.0.0.1:9 cannot be reached")
    assert err.count("\n") == 1
    (record,) = (tmp_path / "runs" / "a").glob("*/seed-0/record.json")
    assert json.loads(record.read_text())["status"] == "finished"
