import json
import shutil
import time

import filelock
import pytest

from src.common.run_folder import RunFolder
from src.tracking.client import Server
from src.tracking.new_state import begin
from src.tracking.push import is_behind, push
from src.tracking.push_state import read_state, state_file
from tests.tracking.folders import (
    LINES,
    make_run,
    name_of,
    points,
    points_on_disk,
    query,
    run_ids,
    runs,
    tags,
    write_lines,
    write_record,
)

FACTS = {"git_sha": "f00d", "versions": {"torch": "2.13.0"}, "device": {"type": "cpu"}}


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Server(f"sqlite:///{database}")


def start(folder, server, **more):
    return begin(folder, server.uri, **{"facts": FACTS, "parent_run_id": None, **more})


def test_a_run_arrives_line_by_line_and_its_end_with_figures_tags_and_files(server, database):
    folder = make_run("study=a", "stability=clip03", lines=LINES[:2], status=None)
    start(folder, server)
    assert push(folder, server, over=False).num_lines == 2
    assert runs(database) == {name_of(folder): "RUNNING"}
    assert tags(database, name_of(folder))["status"] == "running"
    write_lines(folder, LINES)
    write_record(folder, status="finished", loss=2.5)
    last = push(folder, server, over=True)
    assert (last.described, last.num_lines, last.status) == (False, 2, "FINISHED")
    assert runs(database) == {name_of(folder): "FINISHED"}
    assert points(database, name_of(folder)) == points_on_disk(folder)
    known = tags(database, name_of(folder))
    assert (known["outcome"], known["status"], known["baseline"]) == ("clean", "finished", "false")
    assert (known["kind"], known["run_folder"]) == ("run", str(folder.resolve()))
    assert (known["git_sha"], known["version.torch"], known["device.type"]) == (
        "f00d",
        "2.13.0",
        "cpu",
    )
    params = dict(query(database, "select key, value from params"))
    assert (params["stability"], params["seed"]) == ("clip03", "0")
    assert params["recipe.betas"] == "[0.9, 0.95]"
    latest = dict(query(database, "select key, value from latest_metrics"))
    summary = {name: value for name, value in latest.items() if name not in LINES[0]}
    assert summary == {"result/val_loss": 2.5, "result/steps": 12, "result/seconds": 60}
    files = {path.name for path in database.parent.glob("mlartifacts/**/*") if path.is_file()}
    assert files == {"config.yaml", "record.json"}


def test_nothing_is_sent_twice(server, database):
    folder = make_run("study=a")
    start(folder, server)
    assert push(folder, server, over=True)
    assert not push(folder, server, over=True)


@pytest.mark.parametrize("moment", ["begun", "open"])
def test_what_a_crash_kept_from_being_noted_is_no_second_row_and_no_second_run(
    server, database, moment
):
    folder = make_run("study=a", lines=LINES[:2], status=None)
    start(folder, server)
    if moment == "open":
        push(folder, server, over=False)
    file = folder / "mlflow.json"
    before = file.read_text()
    write_lines(folder, LINES)
    write_record(folder, status="finished")
    push(folder, server, over=True)
    end = query(database, "select end_time from runs")
    file.write_text(before)
    again = push(folder, server, over=True)
    assert (again.num_lines, again.status) == (4 if moment == "begun" else 2, "FINISHED")
    assert runs(database) == {name_of(folder): "FINISHED"}
    assert points(database, name_of(folder)) == points_on_disk(folder)
    assert len(query(database, "select * from metrics where key like 'result/%'")) == 3
    assert query(database, "select end_time from runs") == end


def test_a_resumed_run_sends_again_what_was_cut_and_only_what_differs_is_a_new_row(
    server, database
):
    folder = make_run("study=a", lines=LINES[:3], status="killed")
    start(folder, server)
    push(folder, server, over=True)
    assert tags(database, name_of(folder))["outcome"] == "killed"
    # The checkpoint was of step 4.
    (folder / "record.json").unlink()
    RunFolder(folder).cut_metrics(step=4)
    start(folder, server)
    assert push(folder, server, over=False).num_lines == 0
    assert runs(database) == {name_of(folder): "RUNNING"}
    assert tags(database, name_of(folder))["outcome"] == "running"
    again = [line | {"speed/step_seconds": 7.0} for line in LINES[2:]]
    write_lines(folder, [*LINES[:2], *again])
    write_record(folder, status="finished")
    push(folder, server, over=True)
    stored, expected = points(database, name_of(folder)), points_on_disk(folder)
    assert stored - expected == {("speed/step_seconds", 8, LINES[2]["speed/step_seconds"]): 1}
    assert expected - stored == {}
    assert runs(database) == {name_of(folder): "FINISHED"}
    assert tags(database, name_of(folder))["outcome"] == "clean"


def test_metrics_trained_again_without_mlflow_are_not_lost(server, database):
    folder = make_run("study=a", lines=LINES[:2], status="killed")
    start(folder, server)
    push(folder, server, over=True)
    # Resumed with tracking=local: nobody has told mlflow.json.
    write_lines(folder, LINES)
    write_record(folder, status="finished")
    assert push(folder, server, over=True).status == "FINISHED"
    assert points(database, name_of(folder)) == points_on_disk(folder)


def test_a_run_that_left_no_record_was_killed(server, database):
    folder = make_run("study=a", status=None)
    start(folder, server)
    push(folder, server, over=True)
    assert runs(database) == {name_of(folder): "KILLED"}
    assert tags(database, name_of(folder))["status"] == "killed"


def test_another_database_in_the_same_place_gets_everything(server, database, template):
    folder = make_run("study=a")
    start(folder, server)
    push(folder, server, over=True)
    first = run_ids(database)
    server = Server(server.uri)
    shutil.copy(template, database)
    assert push(folder, server, over=True).num_lines == len(LINES)
    assert run_ids(database).keys() == first.keys()
    assert points(database, name_of(folder)) == points_on_disk(folder)


def test_a_run_deleted_in_mlflow_stays_so_unless_it_is_trained_again(server, database):
    folder = make_run("study=a", status="killed")
    start(folder, server)
    push(folder, server, over=True)
    server.client.delete_run(run_ids(database)[name_of(folder)])
    write_record(folder, status="finished")
    assert not push(folder, server, over=True)
    assert runs(database) == {}
    start(folder, server)
    push(folder, server, over=False)
    assert runs(database) == {name_of(folder): "RUNNING"}


def test_a_changed_field_that_changes_no_number_keeps_no_run_from_being_resumed(server, database):
    for every in (4, 5):
        folder = make_run("study=a", f"recipe.checkpoint_every={every}", status=None)
        start(folder, server)
        push(folder, server, over=False)
    params = dict(query(database, "select key, value from params"))
    assert params["recipe.checkpoint_every"] == "4"


def test_each_place_has_a_state_of_its_own(server, database, template, tmp_path):
    folder = make_run("study=a")
    start(folder, server)
    push(folder, server, over=True)
    other = Server(f"sqlite:///{shutil.copy(template, tmp_path / 'other.db')}")
    start(folder, other, running=False)
    assert push(folder, other, over=True).num_lines == len(LINES)
    assert not push(folder, server, over=True)
    assert points(tmp_path / "other.db", name_of(folder)) == points_on_disk(folder)
    one, two = (read_state(state_file(folder, place.uri)) for place in (server, other))
    assert one.run_id != two.run_id
    # A run of the past began so long before its record as it took.
    assert (time.time() * 1000 - two.begun) == pytest.approx(60_000, abs=30_000)


def test_two_never_deliver_one_folder_at_a_time(server, monkeypatch):
    folder = make_run("study=a")
    start(folder, server)
    monkeypatch.setattr("src.tracking.push_state.WAIT_SECONDS", 0.0)
    with filelock.FileLock(folder / ".mlflow.lock"), pytest.raises(filelock.Timeout):
        push(folder, server, over=True)


@pytest.mark.parametrize(("warned", "tag"), [(True, "step 9: it falls"), (False, "none")])
def test_an_early_warning_is_a_tag(warned, tag, server, database):
    folder = make_run("study=a", lines=LINES, status=None)
    start(folder, server)
    write_record(folder, status="finished", warned=warned)
    push(folder, server, over=True)
    assert tags(database, name_of(folder))["alarm"] == tag


def test_what_an_observer_measures_is_not_sent_as_the_run_s_own(server, database):
    measured = {"val_ema/loss": 2.0, "stability/ema_updates": 4.0}
    own = {"val/loss": 3.0, "stability/noise_scale": 1.0}
    lines = [{"step": 4, **own, **measured}]
    carrying = make_run("study=a", "observe={ema:{decay:0.9,horizon_frac:null}}", lines=lines)
    averaging = make_run("study=a", "stability=ema", lines=lines)
    for folder, sent in ((carrying, own), (averaging, own | measured)):
        start(folder, server)
        assert push(folder, server, over=True).num_lines == 1
        assert {name for name, _, _ in points(database, name_of(folder))} == set(sent)


def test_a_run_that_an_earlier_version_delivered_gets_its_summary(server, database):
    folder = make_run("study=a")
    start(folder, server)
    push(folder, server, over=True)
    file = folder / "mlflow.json"
    known = json.loads(file.read_text())
    assert known.pop("summed_up")
    file.write_text(json.dumps(known))
    assert is_behind(folder, file)
    query(database, "delete from metrics where key like 'result/%'")
    assert push(folder, server, over=True).status == "FINISHED"
    assert query(database, "select key from metrics where key = 'result/val_loss'")
    assert not is_behind(folder, file)
    assert not push(folder, server, over=True)
