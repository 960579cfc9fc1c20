"""Reports of whatever there is, and the command that writes them."""

import csv
import re
import time
import xml.etree.ElementTree as ET

import pytest

from src.report import main
from src.study.analysis.analyse import analyse
from tests.runs import start
from tests.study import synthetic
from tests.study.pages import ARMS, full_report, report
from tests.study.synthetic import Arm


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of five arms and its report."""
    return full_report(tmp_path_factory.mktemp("full"))


def with_removed_files(study, name):
    for run in study.runs:
        (run.folder / name).unlink()
    return synthetic.collect(study.folder.parent, study.name)


@pytest.mark.parametrize(
    "arms",
    [
        {"none": Arm()},
        {"none": Arm(num_failing=1, nonfinite_frac=1.0, outcome="collapsed")},
        {"none": Arm(ffn="mlp", config={"ffn": {"inner_dim": 64}})},
        {"none": Arm(status="unfinished")},
        {"none": Arm(status="killed", steps=200), "ema": Arm(status="failed", steps=100)},
        {"none": Arm(), "ema": Arm(seeds=[7])},
        {"none": Arm(seeds=[9]), "ema": Arm(baseline="none"), "clip03": Arm(seeds=[])},
        {"none": Arm(max_steps=3), "ema": Arm(max_steps=1)},
        {"none": Arm(repeats=2), "shaken": Arm(repeats=3, num_failing=1)},
        {"none": Arm(steps=1, status="killed", record={"steps": 0, "best": {}, "final": {}})},
    ],
    ids=[
        "one arm",
        "no finite validation",
        "no experts",
        "unfinished",
        "killed and failed",
        "no pair",
        "unequal seeds",
        "very short",
        "repeats",
        "killed at once",
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_report_comes_of_what_there_is(arms, seeds, tmp_path):
    study = synthetic.study(tmp_path, arms, seeds=seeds)
    files, page = report(study, tmp_path)
    assert len(page.table("What happened")) == len(study.variants)
    assert len(page.table("Every run")) == len(study.runs)
    # Drops Vega's own code, and keeps the data from which the charts are drawn.
    source = re.sub(r"<script>.*?</script>", "", page.source, flags=re.S)
    assert not re.search(r"\b(?:nan|NaN|None)\b", source.replace("first NaN", ""))
    for drawing in files.page.parent.glob("figures/*.svg"):
        ET.parse(drawing)


def test_runs_without_metrics_or_record_are_reported_as_unfinished(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(), "ema": Arm()}, seeds=2)
    study = with_removed_files(study, "metrics.jsonl")
    _, page = report(study, tmp_path)
    assert 'id="loss"' not in page.source
    study = with_removed_files(study, "record.json")
    _, page = report(study, tmp_path)
    assert {row[2] for row in page.table("Every run")} == {"unfinished"}


def test_a_study_without_incidents_experts_or_arms_to_compare_has_no_empty_sections(tmp_path):
    _, page = report(synthetic.study(tmp_path, {"none": Arm()}, seeds=2), tmp_path)
    for anchor in ("incidents", "load", "comparisons", "config"):
        assert f'id="{anchor}"' not in page.source
        assert f'href="#{anchor}"' not in page.source


def test_every_link_of_the_contents_leads_somewhere(full):
    _, _, page = full
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    inner = {link[1:] for link in links if link.startswith("#")}
    assert inner == anchors


def test_two_hundred_runs_take_less_than_twenty_seconds_of_work(tmp_path):
    arms = {"none": Arm(num_failing=6)}
    arms |= {f"clip{i:02}": Arm(num_failing=i % 7, batches=100) for i in range(33)}
    study = synthetic.study(tmp_path, arms)
    assert len(study.runs) == 204
    # The time of this process alone: what else the machine does takes none of it.
    before = time.process_time()
    _, page = report(study.folder, tmp_path)
    assert time.process_time() - before < 20
    assert len(page.table("What happened")) == 34


def test_the_command_shows_answer_table_and_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = synthetic.study(tmp_path, ARMS)
    assert main(["study=synthetic"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(analyse(study).answer[0])
    assert "ffn moe_writeup_add, preset stress" in out
    assert all(arm in out for arm in ARMS)
    assert "runs/synthetic/report/report.html" in out
    assert main(["study=synthetic", "paths.runs=runs", "out=there"]) == 0
    with (tmp_path / "there" / "report.csv").open() as file:
        assert len(list(csv.reader(file))) == 31


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["study=null", "name one of study=NAME, studies=[NAME,NAME], csv=FILE"]),
        (["study=nothing"], ["study=nothing", "runs", "allowed: synthetic"]),
        (["study=null"], ["study=null"]),
        (["study=[a]"], ["study=[a]", "is one study", "studies=[a]"]),
        (["study=../runs"], ["study=../runs", "letters"]),
        (["study=synthetic", "out=file"], ["out=file", "cannot be written"]),
        (["study=synthetic", "out=[a]"], ["out=", "a file or a folder"]),
        (["study=synthetic", "paths.runs=nowhere"], ["study=synthetic", "nowhere", "none yet"]),
        (["study=synthetic", "paths=3"], ["paths=3", "wrong type"]),
        (["stduy=synthetic"], ["stduy", "unknown field"]),
        (["-m", "study=synthetic"], ["--multirun", "only with src.train"]),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(
    arguments, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    (tmp_path / "file").write_text("")
    before = set(tmp_path.rglob("*"))
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert all(part in line for part in parts), line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("record.json", "{"),
        ("record.json", "[1]"),
        ("record.json", '{"status": "finished"}'),
        ("record.json", '{"steps": 3}'),
        ("config.yaml", ""),
        ("config.yaml", "seed: a"),
        ("metrics.jsonl", "{\n"),
        (".sweeps/00000001.json", "{}"),
        (".sweeps/00000001.json", '{"cells": [{}]}'),
    ],
)
def test_a_damaged_file_is_named_in_one_line(file, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    folder = study.folder if file.startswith(".") else study.runs[0].folder
    (folder / file).write_text(content)
    assert main(["study=synthetic"]) == 2
    error = capsys.readouterr().err
    assert f"{file}: is damaged" in error
    assert error.count("\n") == 1
    assert ("delete it" in error) == file.startswith(".")


@pytest.mark.slow
def test_the_same_as_a_process_of_its_own(tmp_path):
    synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    process = start("report", ["study=nothing"], tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: study=nothing")
