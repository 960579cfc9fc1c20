"""Runs that were made elsewhere are compared from a CSV file or an MLflow experiment."""

import csv

import mlflow
import numpy as np
import pytest

from src.report import main
from src.study.analysis import outside
from src.study.read.outside_runs import OutsideRun, OutsideStudy, from_mlflow

SEEDS = 8
MAX = 1.7976931348623157e308


def table(path, **arms):
    """A CSV file with a line per run; `arms` holds the values by seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "loss"])
        for arm, values in arms.items():
            writer.writerows([arm, seed, value] for seed, value in enumerate(values))
    return path


def report(path, *more):
    return main([f"csv={path}", "arm=method", "seed=seed", "endpoint=loss", *more])


def test_losses_are_compared_within_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Seeds differ by far more than arms do.
    level = np.linspace(1.0, 9.0, SEEDS)
    noise = np.array([0.01, -0.02, 0.0, 0.03, -0.01, 0.02, -0.03, 0.01])
    file = table(tmp_path / "runs.csv", none=level, better=level - 0.1 + noise, same=level + noise)

    assert report(file) == 0

    said = capsys.readouterr().out
    assert "No run fails; loss is compared, with none as the control." in said
    assert "loss: better: lower, by 0.099" in said
    assert "loss: cannot tell: same" in said
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "better" in page and "<svg" in page
    with (tmp_path / "comparison" / "arms.csv").open() as lines:
        rows = {row["arm"]: row for row in csv.DictReader(lines)}
    # Two signs of eight, and two arms.
    assert float(rows["better"]["values_p_value"]) == pytest.approx(2 * 2 / 2**SEEDS)


def test_a_run_without_a_finite_value_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = table(
        tmp_path / "runs.csv",
        control=["nan", "", "inf", 2.0, "NaN", "", "nan", "nan"],
        cure=[2.0] * SEEDS,
        half=["nan", 2.0, "nan", 2.0, "nan", 2.0, "nan", 2.0],
    )

    assert report(file, "out=there") == 0

    said = capsys.readouterr().out
    assert "With control 7 of 8 runs fail." in said
    assert "cure: fewer runs fail, by 0.875" in said
    assert "Cannot tell: half (4 of 8 fail)." in said
    assert "To see a halving of the failures, run" in said
    assert (tmp_path / "there" / "report.html").is_file()


def test_yes_and_no_are_failures_and_a_single_seed_has_no_p(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = table(tmp_path / "runs.csv", none=["yes"], cure=["no"])

    assert report(file) == 0

    said = capsys.readouterr().out
    assert "1 seed, no interval: cure 0 of 1 fail." in said
    assert "run at least 6 seeds" in said and "p =" not in said


def test_arms_of_the_control_are_pooled():
    generator = np.random.default_rng(0)
    runs = [
        OutsideRun(arm=arm, seed=str(seed), value=float(generator.normal() + seed))
        for arm in ("plain", "plain again", "new")
        for seed in range(6)
    ]
    study = OutsideStudy(name="x", endpoint="loss", runs=runs, is_failure=False)

    (_, _, new) = outside.compare(study, ["plain", "plain again"])

    assert new.effects[outside.VALUES].tested.smallest_p == pytest.approx(1 / 3**6)
    assert not any(arm.effects for arm in outside.compare(study, ["plain", "plain again"])[:2])


def test_null_tables_have_a_finding_in_at_most_one_of_twenty():
    generator = np.random.default_rng(3)
    found, number = 0, 200
    for _ in range(number):
        runs = [
            OutsideRun(arm=arm, seed=str(seed), value=float(generator.normal()))
            for arm in ("none", "a", "b", "c")
            for seed in range(8)
        ]
        study = OutsideStudy(name="x", endpoint="loss", runs=runs, is_failure=False)
        arms = outside.compare(study, ["none"])
        found += any(e.tested.detected for arm in arms for e in arm.effects.values())

    # And two and a half standard errors.
    assert found / number <= 0.05 + 2.5 * (0.05 * 0.95 / number) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one of study=NAME, studies=[NAME,NAME], csv=FILE and mlflow=EXPERIMENT"),
        (["study=a", "csv=b"], "study=a csv=b: name one of"),
        (["csv=runs.csv"], "arm=null: name the column of the arm"),
        (["csv=runs.csv", "arm=metod", "seed=seed", "endpoint=loss"], "did you mean method?"),
        (["csv=runs.csv", "arm=method", "seed=seed", "endpoint=los"], "did you mean loss?"),
        (["csv=runs.csv", "arm=method", "seed=seed", "endpoint=method"], "neither a number nor"),
        (["csv=runs.csv", "arm=method", "seed=seed", "endpoint=loss"], "name the untreated arm"),
        (
            ["csv=runs.csv", "arm=method", "seed=seed", "endpoint=loss", "control=sdg"],
            "did you mean sgd?",
        ),
        (
            ["csv=runs.csv", "arm=method", "seed=seed", "endpoint=loss", "control=[sgd,adam]"],
            "leaves no arm",
        ),
        (["csv=blank.csv", "arm=method", "seed=seed", "endpoint=loss"], "run 1 has no arm"),
        (
            ["csv=runs.csv", "arm=method", "seed=seed", "endpoint=loss", "control=[]"],
            "name the untreated arm",
        ),
        (["csv=empty.csv", "arm=method", "seed=seed", "endpoint=loss"], "holds no run"),
        (["csv=gone.csv", "arm=method", "seed=seed", "endpoint=loss"], "cannot be read"),
        (["mlflow=nothing", "arm=a", "seed=s", "endpoint=e"], "no such experiment"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    table(tmp_path / "runs.csv", sgd=[1.0, 2.0], adam=[1.0, 2.0])
    table(tmp_path / "empty.csv")
    (tmp_path / "blank.csv").write_text("method,seed,loss\n,0,1.0,\n")

    assert main(arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "comparison").exists()


def test_what_mlflow_holds_is_read_as_it_was_logged():
    runs = [
        {"params": {"lr": "0.1", "seed": "0"}, "tags": {}, "metrics": {"lr": 0.0, "loss": 1.0}},
        # A database holds infinity as the largest number.
        {"params": {"lr": "0.2", "seed": "0"}, "tags": {}, "metrics": {"lr": 0.0, "loss": MAX}},
        {"params": {"lr": "0.2"}, "tags": {}, "metrics": {"loss": 1.0}},
    ]

    study = from_mlflow(runs, name="x", arm="lr", seed="seed", endpoint="loss")

    assert [(run.arm, run.value) for run in study.runs] == [("0.1", 1.0), ("0.2", None)]


@pytest.mark.slow
def test_an_experiment_that_another_program_logged_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/theirs.db")
    mlflow.set_experiment("theirs")
    for optimizer in ("sgd", "adam"):
        for seed in range(SEEDS):
            with mlflow.start_run():
                mlflow.log_params({"optimizer": optimizer, "seed": seed})
                mlflow.log_metric("eval/loss", seed - 0.5 * (optimizer == "adam"))

    arguments = ["mlflow=theirs", "arm=optimizer", "seed=seed", "endpoint=eval/loss"]
    uri = f"tracking.uri=sqlite:///{tmp_path}/theirs.db"
    assert main([*arguments, uri, "control=sgd"]) == 0

    assert "eval/loss: adam: lower, by 0.500" in capsys.readouterr().out
    assert main([*arguments[:-1], "endpoint=eval/los", uri, "control=sgd"]) == 2
    assert "did you mean eval/loss?" in capsys.readouterr().err
