import json

import filelock
import pytest

from src.sync import main
from src.tracking import labels
from src.tracking.client import Server
from src.tracking.labels import PARENT
from src.tracking.new_state import begin
from src.tracking.push import push
from tests.tracking.folders import (
    LINES,
    make_run,
    name_of,
    points,
    points_on_disk,
    run_ids,
    runs,
    tags,
    write_lines,
)


@pytest.fixture
def uri(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{database}"


def started(uri, *more, **kinds):
    """A run that was begun to be mirrored, with the server away from the beginning."""
    folder = make_run(*more, **kinds)
    begin(folder, uri, facts={}, parent_run_id=None)
    return folder


def test_everything_missing_is_brought_and_said_once(uri, database, capsys):
    one = started(uri, "study=a")
    two = started(uri, "study=b", "seed=2", status="failed")
    push(two, Server(uri), over=True)
    local = make_run("study=a", "seed=1")
    assert main([]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{one}: tags and params, {len(LINES)} lines of metrics, its end (FINISHED)",
        "1 run brought up to date, 1 already up to date",
    ]
    assert runs(database) == {name_of(one): "FINISHED", name_of(two): "FAILED"}
    assert points(database, name_of(one)) == points_on_disk(one)
    assert not (local / "mlflow.json").exists()
    assert main([]) == 0
    assert capsys.readouterr().out == "0 runs brought up to date, 2 already up to date\n"


def test_one_study_alone(uri, database):
    started(uri, "study=a")
    two = started(uri, "study=b", "seed=1")
    assert main(["study=b"]) == 0
    assert runs(database) == {name_of(two): "FINISHED"}


def test_records_without_mlflow_are_brought_to_the_place_that_is_typed(uri, database, capsys):
    cells = [make_run("study=a", "tracking.sweep_id=s1", f"seed={seed}") for seed in (0, 1)]
    sweep = cells[0].parent.parent / ".sweeps" / "s1"
    sweep.mkdir(parents=True)
    left = {"study": "a", "command": "-m seed=0,1", "status": "failed", "started": 1e9}
    sweep.with_name("s1.json").write_text(json.dumps({**left, "ended": 1e9 + 60}))
    assert main([f"tracking.uri={uri}"]) == 0
    assert capsys.readouterr().out.endswith("2 runs brought up to date, 0 already up to date\n")
    assert runs(database) == {
        "sweep s1": "FAILED",
        name_of(cells[0]): "FINISHED",
        name_of(cells[1]): "FINISHED",
    }
    assert tags(database, "sweep s1")["command"] == "-m seed=0,1"
    known = tags(database, name_of(cells[1]))
    assert known[PARENT] == run_ids(database)["sweep s1"]
    assert (known["git_sha"], known["version.torch"], known["seed"]) == ("f00d", "2.13.0", "1")
    # From now on it is where they belong.
    assert main([]) == 0
    assert capsys.readouterr().out == "0 runs brought up to date, 2 already up to date\n"


def test_a_run_in_progress_is_left_to_itself(uri, database, capsys):
    folder = started(uri, "study=a", status=None)
    push(folder, Server(uri), over=False)
    with filelock.FileLock(folder / ".lock"):
        assert main([]) == 0
    assert runs(database) == {name_of(folder): "RUNNING"}
    assert "0 already up to date, 1 in progress" in capsys.readouterr().out


def test_a_killed_run_is_completed_and_closed(uri, database):
    folder = started(uri, "study=a", status=None, lines=LINES[:2])
    push(folder, Server(uri), over=False)
    write_lines(folder, LINES)
    assert main([]) == 0
    assert runs(database) == {name_of(folder): "KILLED"}
    assert points(database, name_of(folder)) == points_on_disk(folder)


def test_a_run_killed_before_anything_was_noted_arrives_too(uri, database):
    folder = make_run("study=a", "tracking=mlflow", f"tracking.uri='{uri}'", status=None)
    assert main([]) == 0
    assert runs(database) == {name_of(folder): "KILLED"}


def test_a_run_of_another_machine_is_closed_only_by_its_record(uri, database, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(labels, "host", lambda: "elsewhere")
        going = started(uri, "study=a", status=None)
        done = started(uri, "study=a", "seed=1")
    push(going, Server(uri), over=False)
    assert main([]) == 0
    assert runs(database) == {name_of(going): "RUNNING", name_of(done): "FINISHED"}


def test_a_server_that_is_away_is_one_line_and_exit_code_1(uri, database, capsys):
    away = [started("http://127.0.0.1:9", "study=a", f"seed={seed}") for seed in (1, 2)]
    here = started(uri, "study=a")
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: MLflow at http://127.0.0.1:9 cannot be reached")
    assert err.count("\n") == 1
    assert out.endswith("1 run brought up to date, 0 already up to date, 2 not sent\n")
    assert runs(database) == {name_of(here): "FINISHED"}
    assert all((folder / "mlflow.json").is_file() for folder in away)


def test_an_address_that_does_not_answer_is_not_kept(uri, capsys):
    folder = make_run("study=a")
    assert main(["tracking.uri=http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "mlflow.json").exists()


def test_a_damaged_folder_keeps_no_other_from_being_brought(uri, database, capsys):
    damaged = started(uri, "study=a")
    (damaged / "record.json").write_text("{")
    other = started(uri, "study=a", "seed=1")
    assert main([]) == 1
    assert f"{damaged}/record.json: is damaged" in capsys.readouterr().err
    assert runs(database)[name_of(other)] == "FINISHED"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("study=c", "study=c: runs holds no run of this study; allowed: a"),
        ("study=aa", "study=aa: runs holds no run of this study; did you mean a? allowed: a"),
        ("paths.runs=nowhere", "paths.runs=nowhere: no such folder"),
    ],
)
def test_bad_input_is_named(uri, capsys, argument, said):
    make_run("study=a")
    assert main([argument]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_sweep_id_that_is_no_name_is_refused(uri, capsys):
    from src.train import main as train

    assert train(["tracking.sweep_id='../x'"]) == 2
    assert "tracking.sweep_id=../x: may contain only letters" in capsys.readouterr().err
