"""MLflow as users have it: a process of its own, because mlflow behaves otherwise under pytest."""

import json
import signal
import sqlite3

import pytest

from src.common.record import results
from src.train import main
from tests.conftest import TINY
from tests.runs import metrics, record, start
from tests.tracking.folders import name_of, points, points_on_disk, query, run_ids, runs, tags
from tests.tracking.waiting import WITH_MLFLOW, start_waiting, until


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def folder_of(study, tmp_path):
    (folder,) = (tmp_path / "runs" / study).glob("*/seed-0")
    return folder


def test_a_run_stands_in_mlflow_with_all_its_metrics_and_training_is_the_same(
    database, tmp_path, monkeypatch
):
    code, _, err = finish(start("train", ["stability=ema", "study=a", *WITH_MLFLOW], tmp_path))
    assert (code, err) == (0, "")
    folder = folder_of("a", tmp_path)
    assert runs(database) == {name_of(folder): "FINISHED"}
    assert points(database, name_of(folder)) == points_on_disk(folder)
    made = record(folder)
    latest = dict(query(database, "select key, value from latest_metrics"))
    summary = {name: value for name, value in latest.items() if name.startswith("result/")}
    judged = results(made, loss="val_ema/loss")
    assert summary == {f"result/{name}": value for name, value in judged.items()}
    assert summary["result/val_loss"] == made["final"]["val_ema/loss"]
    known = tags(database, name_of(folder))
    params = dict(query(database, "select key, value from params"))
    for axis, value in {"attention": "mlha", "stability": "ema", "seed": "0"}.items():
        assert known[axis] == params[axis] == value
    assert (known["outcome"], known["baseline"]) == ("clean", "false")
    assert known["incident"] == "none"
    assert known["version.torch"] == made["versions"]["torch"]
    assert known["device.type"] == made["device"]["type"]
    assert known["git_sha"] == str(made["git_sha"])
    assert known["config_hash"] == made["config_hash"]
    assert params["recipe.learning_rate"] == "0.005"
    artifacts = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert artifacts == {"config.yaml", "record.json", "samples.md"}
    # Trackers on or off: equal.
    monkeypatch.chdir(tmp_path)
    assert main(["stability=ema", "study=b", *TINY]) == 0
    assert metrics(folder_of("b", tmp_path)) == metrics(folder)


@pytest.mark.slow
def test_a_terminated_run_is_killed_and_goes_on_in_the_same_mlflow_run(database, tmp_path):
    process = start_waiting(["study=a"], tmp_path)
    until(lambda: any(points(database, name) for name in runs(database)))
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert finish(process)[0] == 143
    folder = folder_of("a", tmp_path)
    name = name_of(folder)
    assert runs(database) == {name: "KILLED"}
    assert tags(database, name)["outcome"] == "killed"
    first = run_ids(database)
    arguments = ["study=a", "tracking.parent_run_id=p1", "tracking.sweep_id=s1", *WITH_MLFLOW]
    assert finish(start("train", arguments, tmp_path))[0] == 0
    assert run_ids(database) == first
    assert runs(database) == {name: "FINISHED"}
    # A sweep made it its own.
    known = tags(database, name)
    assert (known["mlflow.parentRunId"], known["sweep_id"]) == ("p1", "s1")
    stored, expected = points(database, name), points_on_disk(folder)
    assert expected - stored == {}
    assert all(metric.startswith("speed/") for metric, _, _ in stored - expected)


@pytest.mark.slow
def test_a_run_killed_by_force_is_mended_and_completed_by_the_next_one(database, tmp_path):
    process = start_waiting(["study=a"], tmp_path)
    until(lambda: any(points(database, name) for name in runs(database)))
    process.kill()
    process.communicate()
    folder = folder_of("a", tmp_path)
    name = name_of(folder)
    assert runs(database) == {name: "RUNNING"}
    with (folder / "metrics.jsonl").open("a") as file:
        # What the server had missed by then, and a line that the kill has torn.
        file.write('{"step": 9, "train/loss": 3.5}\n{"step": 10, "tra')
    assert finish(start("train", ["study=b", "seed=1", *WITH_MLFLOW], tmp_path))[0] == 0
    assert set(runs(database).values()) == {"KILLED", "FINISHED"}
    assert runs(database)[name] == "KILLED"
    assert points(database, name)[("train/loss", 9, 3.5)] == 1


@pytest.mark.slow
def test_a_server_that_is_away_is_named_and_training_goes_on(tmp_path):
    process = start(
        "train", ["study=a", *WITH_MLFLOW], tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    code, _, err = finish(process)
    assert code == 0
    assert err.startswith("warning: MLflow at http://127.0.0.1:9 cannot be reached")
    assert err.count("\n") == 1
    assert (
        json.loads((folder_of("a", tmp_path) / "record.json").read_text())["status"] == "finished"
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "end"])
def test_a_database_that_another_process_holds_locked_costs_one_line_and_no_metric(
    database, tmp_path, moment
):
    other = sqlite3.connect(database)
    if moment == "start":
        other.execute("begin exclusive")
        process = start("train", ["study=a", *WITH_MLFLOW], tmp_path)
    else:
        process = start_waiting(["study=a"], tmp_path)
        until(lambda: any(points(database, name) for name in runs(database)))
        other.execute("begin exclusive")
        (tmp_path / "go").touch()
    code, _, err = finish(process)
    assert code == 0
    assert err.startswith(f"warning: MLflow at sqlite:///{database} cannot be reached or written")
    assert "locked" in err or "in time" in err
    assert err.count("\n") == 1
    other.close()
    assert finish(start("sync", [], tmp_path))[0] == 0
    folder = folder_of("a", tmp_path)
    assert points(database, name_of(folder)) == points_on_disk(folder)
    assert runs(database) == {name_of(folder): "FINISHED"}
