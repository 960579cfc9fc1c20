import filelock
import pytest

from src.tracking import labels
from src.tracking.client import Server
from src.tracking.new_state import begin
from src.tracking.push import push
from src.tracking.stale_runs import catch_up, close_stale_runs
from tests.tracking.folders import (
    LINES,
    make_run,
    name_of,
    points,
    points_on_disk,
    runs,
    tags,
    write_lines,
    write_record,
)


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Server(f"sqlite:///{database}")


@pytest.fixture
def stale(server):
    """A run that MLflow calls RUNNING and whose process is gone."""
    folder = make_run("study=a", lines=LINES[:2], status=None)
    begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=False)
    return folder


def test_a_stale_run_is_killed_and_says_that_it_was_mended(server, database, stale):
    assert close_stale_runs(server, "a") == [name_of(stale)]
    assert runs(database) == {name_of(stale): "KILLED"}
    known = tags(database, name_of(stale))
    assert (known["status"], known["outcome"], known["mended"]) == ("killed", "killed", "true")
    assert close_stale_runs(server, "a") == []


def test_a_resumed_run_is_mended_no_longer(server, database, stale):
    close_stale_runs(server, "a")
    begin(stale, server.uri, facts={}, parent_run_id=None)
    push(stale, server, over=False)
    assert runs(database) == {name_of(stale): "RUNNING"}
    assert "mended" not in tags(database, name_of(stale))


def test_a_run_whose_folder_is_locked_goes_on(server, database, stale):
    with filelock.FileLock(stale / ".lock"):
        assert close_stale_runs(server, "a") == []
    assert runs(database) == {name_of(stale): "RUNNING"}


def test_a_run_of_another_machine_is_left_alone(server, database, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(labels, "host", lambda: "elsewhere")
        folder = make_run("study=a", status=None)
        begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=False)
    assert close_stale_runs(server, "a") == []
    assert runs(database) == {name_of(folder): "RUNNING"}


def test_a_run_that_is_not_ours_is_left_alone(server, database):
    server.client.create_run(server.experiment_id("a"), run_name="by hand")
    assert close_stale_runs(server, "a") == []
    assert runs(database) == {"by hand": "RUNNING"}


def test_a_run_without_its_folder_is_killed(server, database, stale):
    stale.rename(stale.with_name("seed-0.moved"))
    close_stale_runs(server, "a")
    assert runs(database) == {name_of(stale): "KILLED"}


def test_a_run_that_ended_while_the_server_was_away_is_what_its_record_says(
    server, database, stale
):
    write_record(stale, status="finished")
    close_stale_runs(server, "a")
    assert runs(database) == {name_of(stale): "FINISHED"}


def test_other_studies_are_none_of_its_business(server, database, stale):
    assert close_stale_runs(server, "b") == []
    assert runs(database) == {name_of(stale): "RUNNING"}


def test_the_next_run_brings_what_earlier_ones_of_any_study_miss(server, database, stale, tmp_path):
    write_lines(stale, LINES)
    other = make_run("study=b", status=None)
    begin(other, server.uri, facts={}, parent_run_id=None)
    never = make_run("study=c")
    catch_up(tmp_path / "runs", server, go_on=lambda: False)
    assert runs(database) == {name_of(stale): "RUNNING"}
    with filelock.FileLock(other / ".lock"):
        catch_up(tmp_path / "runs", server, go_on=lambda: True)
    assert runs(database) == {name_of(stale): "KILLED"}
    assert points(database, name_of(stale)) == points_on_disk(stale)
    assert tags(database, name_of(stale))["mended"] == "true"
    # tracking=local was meant for no server.
    assert not (never / "mlflow.json").exists()


def test_what_has_arrived_is_not_asked_about_again(server, database, stale, tmp_path, monkeypatch):
    catch_up(tmp_path / "runs", server, go_on=lambda: True)

    def client(self):
        raise AssertionError

    monkeypatch.setattr(Server, "client", property(client))
    catch_up(tmp_path / "runs", server, go_on=lambda: True)
    write_record(stale, status="finished")
    with pytest.raises(AssertionError):
        catch_up(tmp_path / "runs", server, go_on=lambda: True)
