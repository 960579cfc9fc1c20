"""The page of MLflow that compares arms: its state, its address, and its links."""

import base64
import json
import zlib

import pytest

from src.tracking import compare_view as view
from src.tracking import pages
from src.tracking.client import KIND, MODEL_TRAINING, Server
from src.tracking.new_state import begin, begin_sweep
from src.tracking.push import NOTE, SUMMARY, push
from tests.tracking.folders import make_run, name_of, query, tags, write_record


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Server(f"sqlite:///{database}")


def sent(server, *arguments):
    """A run folder whose finished run MLflow has."""
    folder = make_run(*arguments)
    write_record(folder, status="finished")
    begin(folder, server.uri, facts={}, parent_run_id=None)
    push(folder, server, over=True)
    return folder


def unpacked(text):
    """The state in a tag, as MLflow reads it."""
    shrunk = json.loads(text)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(shrunk)))


def experiment_tags(database):
    found = "select key, value from experiment_tags join experiments using (experiment_id)"
    return dict(query(database, f"{found} where name = 'a'"))


def test_the_view_of_a_study_groups_its_runs_by_arm(server, database):
    folders = [
        sent(server, "study=a", f"stability={name}", f"seed={seed}")
        for name in ("none", "clip03")
        for seed in (0, 1)
    ]
    written = view.write_view(server, "a")
    known = experiment_tags(database)
    assert known[KIND] == MODEL_TRAINING
    assert json.loads(known[view.TAG])["name"] == "Arms compared"
    state = unpacked(known[view.TAG])
    (group,) = state["groupBy"]["groupByKeys"]
    arms = [tags(database, name_of(folder))[group["groupByData"]] for folder in folders]
    # Behind it, what is left of the many fields of these small runs.
    assert [arm.partition(" ")[0] for arm in arms] == ["none", "none", "clip03", "clip03"]
    assert len(set(arms)) == 2
    assert state["searchFilter"] == "tags.kind = 'run'"
    assert {"tags.`seed`", "tags.`outcome`", "metrics.`result/seconds`"} <= set(
        state["selectedColumns"]
    )
    drawn = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert drawn[:3] == ["train/loss", "val/loss", "grad/norm"]
    assert "result/nonfinite_steps" in drawn
    (opened,) = (part for part in state["compareRunSections"] if part["display"])
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {opened["uuid"]}
    # No sweep has run, so there is no answer to link to.
    assert set(written.links()) == {"arms compared", "table of runs"}


def test_a_study_without_runs_has_no_view(server, database):
    with pytest.raises(view.NoRunsError, match="has no run of it"):
        view.write_view(server, "a")


def test_a_sweep_is_described_by_the_summary_of_its_report(server, database, tmp_path):
    folder = tmp_path / "runs" / "a" / ".sweeps" / "s1"
    state = begin_sweep(folder, server.uri, "a", command="...", description="")
    summary = tmp_path / SUMMARY
    summary.write_text("Nothing fails.\n\n| arm | outcome |\n")
    state.artifacts, state.status = [str(summary)], "FINISHED"
    state.write(folder / "mlflow.json")
    push(folder, server, over=True)
    note = tags(database, "sweep s1")[NOTE]
    links, _, text = note.partition("\n\n")
    assert text == summary.read_text()
    assert "/artifacts/report/report.html" in links and "viewStateShareKey=arms" in links


@pytest.mark.parametrize(
    ("variants", "labels"),
    [
        (["mlha+moe+none", "mlha+moe+clip03"], ["none", "clip03"]),
        (["mlha+moe+none@model-x", "mlha+mlp+none@model-x"], ["none moe", "none mlp"]),
        (["mlha+moe+ema", "mlha+moe+ema@top_k-1"], ["ema", "ema top_k-1"]),
        (["mlha+moe+ema@model-x"], ["ema"]),
    ],
)
def test_labels_of_arms_hold_what_differs(variants, labels):
    assert list(view.arm_labels(variants).values()) == labels


def test_arms_get_different_colours_where_one_tag_gives_two_the_same():
    # As MLflow colours them: `#115026` both.
    assert view._colour("tag.stability.clip03") == view._colour("tag.stability.router_eps") == 17
    arms = ["none", "shaken", "clip03", "router_eps", "ema", "warmdown"]
    tag = view._arm_tag(arms)
    assert len({view._colour(f"tag.{tag}.{arm}") for arm in arms}) == len(arms)


@pytest.mark.parametrize("study", ["a", "</script>'\"`${x}"])
def test_a_short_address_leads_to_the_view_whatever_the_study_is_called(study):
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    client = TestClient(Starlette(routes=[Route("/compare/{study:path}", pages.compare)]))
    page = client.get("/compare/" + study.replace("/", "%2F")).text
    assert page.count("</script") == 1
    assert view.CHARTS_QUERY in page


def test_mlflow_finds_the_app_by_the_entry_point_of_the_project():
    import tomllib

    from tests.runs import ROOT

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["mlflow.app"][pages.APP].partition(":")
    assert (module, getattr(pages, name)) == (pages.__name__, pages.create_app)
