"""What a report shows, whatever the study; that it shows runs' texts as text and loads nothing."""

import csv
import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from src.report import main
from src.study.analysis import analyse
from src.study.cells import number
from src.study.digits import NONE
from src.study.overview import arms_table
from src.study.report import read_csv, write_report
from src.study.rows import arm_rows, headline
from src.study.table import MARK, setting
from src.study.tables import runs_table
from tests.runs import start
from tests.study import synthetic
from tests.study.synthetic import Arm

ARMS = {
    "none": Arm(num_failing=6),
    "shaken": Arm(num_failing=5, first=320, acts_from=240),
    "router_eps": Arm(loss=(2.01, 2.03, 2.02)),
    "warmdown": Arm(num_failing=2, acts_from=240, spikes=([300], [])),
    "early_stop": Arm(acts_from=280, steps=280),
}


class Page(HTMLParser):
    """The elements of a page, and its tables by title."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attrs)["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True
        elif tag == "small":
            self._rows[-1][-1] += "|"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self._rows[-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        """The body of the one table whose title begins so."""
        (rows,) = (rows for title, rows in self.tables.items() if title.startswith(start))
        return rows[1:]


def report(study, tmp_path):
    files = write_report(study, tmp_path / "out", show=False)
    return files, Page(files.page)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of five arms and its report."""
    folder = tmp_path_factory.mktemp("full")
    study = synthetic.study(folder, ARMS)
    files = write_report(study, show=False)
    return study, files, Page(files.page)


def texts_of(table):
    """Cells as the page shows them; an arm that is named again loses its asides."""
    rows, before = [], None
    for row in table.rows:
        shown = ["|".join((cell.text, *cell.asides)) for cell in row]
        if row[0] == before:
            shown[0] = row[0].text
        before = row[0]
        rows.append(shown)
    return rows


# ------------------------------------------------------------------ content


def test_the_page_begins_with_the_answer_then_the_figure_then_the_table(full):
    study, _, page = full
    (first, *_) = analyse(study).answer
    places = [page.source.index(text) for text in (first, "<svg", "<table", 'id="loss"')]
    assert places == sorted(places)


def test_every_arm_is_in_the_first_table_with_its_outcomes(full):
    _, _, page = full
    rows = {row[0].split("|")[0]: row for row in page.table("What happened")}
    assert list(rows) == list(ARMS)
    assert rows["none"][2] == "6\N{NO-BREAK SPACE}intermittent"
    assert rows["router_eps"][0] == "router_eps|known good"
    assert rows["router_eps"][3] == "0 of 6|baseline 6 of 6"
    assert rows["shaken"][0] == "shaken|null arm|acts after step 240"
    assert "trains to step 280 only" in rows["early_stop"][0]


def test_the_title_of_every_table_names_router_and_preset(full):
    study, files, page = full
    assert setting(study) == "ffn moe_writeup_add, preset stress"
    assert len(page.tables) >= 7
    for title in page.tables:
        assert "ffn moe_writeup_add, preset stress" in title
    titles = re.findall(r"^\*\*(.*)\*\*$", files.page.with_suffix(".md").read_text(), re.M)
    assert len(titles) >= 7
    assert all("ffn moe\\_writeup\\_add, preset stress" in title for title in titles)


def test_every_difference_stands_beside_what_chance_gave(full):
    study, _, page = full
    arms = {arm.label: arm for arm in analyse(study).arms}
    rows = [*page.table("Failures and loss"), *page.table("Other endpoints")]
    # Every arm but the baseline, on each of five endpoints.
    assert len(rows) == 5 * (len(ARMS) - 1)
    endpoints = {"non-finite seeds, share": "nonfinite", "val/loss": "loss", "spikes": "spikes"}
    checked = 0
    for row in rows:
        found = arms[row[0].split("|")[0]].comparisons.get(endpoints.get(row[1], ""))
        if found is not None:
            assert (row[4] == NONE) == (found.null_range is None)
            assert (row[6] == NONE) == (found.smallest_p is None)
            assert (row[7] == NONE) == (found.smallest_effect is None)
            assert row[8] == found.verdict
            checked += found.null_range is not None and found.smallest_p is not None
    assert checked >= 4


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_a_loss_with_nonfinite_windows_is_marked_in_every_table(suffix, tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(num_failing=1, batches=3, loss=(2.222, 2.1))})
    report(study, tmp_path)
    text = (tmp_path / "out" / f"report.{suffix}").read_text()
    # The arm's, the seed's at the end, and the mean at the last eleventh.
    assert text.count(f"2.222{MARK}") == 2
    assert text.count(f"1 not clean: 2.222{MARK}") == 1
    mean = (3 * 2.222 + 3 * 2.1) / 6
    assert f"{mean:.3f}{MARK}" in text
    assert "some validation windows had no finite loss" in text


def test_nothing_is_marked_where_all_is_finite(tmp_path):
    _, page = report(synthetic.study(tmp_path, {"none": Arm()}), tmp_path)
    assert MARK not in page.source


def test_steps_that_were_shared_are_counted(full):
    _, files, page = full
    # Six seeds each: 240 of shaken and of warmdown, 280 of early_stop.
    said = "4,560 of 12,240 steps were not trained anew"
    assert said in page.source
    assert said in files.page.with_suffix(".md").read_text()


def test_differences_in_configuration_are_named_and_nothing_else(tmp_path):
    arms = {"none": Arm(), "clip03": Arm(config={"recipe.clip_norm": 0.3, "paths.cache": "x"})}
    _, page = report(synthetic.study(tmp_path, arms, seeds=1), tmp_path)
    assert page.table("Differences") == [
        ["clip03|against none", "recipe.clip_norm", "1.0", "0.3"],
    ]


def test_the_page_says_how_to_repeat_it_and_with_what_code(full):
    _, _, page = full
    assert "python -m src.train --multirun stability=..." in page.source
    assert "python -m src.report study=synthetic paths.runs=" in page.source
    (origin,) = page.table("Where the runs come from")
    assert origin[:2] == ["30", synthetic.SHA[:10]]


def test_runs_of_two_codes_are_told_apart(tmp_path):
    arms = {"none": Arm(record={"code": "aaaa"}), "ema": Arm(record={"code": "bbbb"})}
    _, page = report(synthetic.study(tmp_path, arms, seeds=2), tmp_path)
    assert sorted(row[2] for row in page.table("Where the runs come from")) == ["aaaa", "bbbb"]


def test_incidents_lead_to_their_pages_from_wherever_the_report_is(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(num_failing=1)}, seeds=2)
    target = study.runs[0].folder / "incidents" / "step-300" / "incident.html"
    target.parent.mkdir(parents=True)
    target.write_text("here")
    for out in (None, tmp_path / "elsewhere" / "deep"):
        files = write_report(study, out, show=False)
        links = [attrs["href"] for tag, attrs in Page(files.page).tags if tag == "a"]
        (link,) = (link for link in links if not link.startswith("#"))
        assert (files.page.parent / unquote(link)).resolve() == target.resolve()
    row = Page(files.page).table("What failed first")[0]
    assert row[:4] == ["none", "0", "300", "router underflow"]


# ------------------------------------------------------------------ files


def test_figures_read_back_from_csv_are_those_of_the_page(full):
    _, files, page = full
    arms = read_csv(files.page.parent / "arms.csv")
    assert texts_of(arms_table(arms, title="")) == page.table("What happened")
    runs = read_csv(files.page.parent / "report.csv")
    assert len(runs) == 30
    assert texts_of(runs_table(runs, title="")) == page.table("Every run")


def test_csv_keeps_full_precision(full):
    study, files, _ = full
    rows = read_csv(files.page.parent / "arms.csv")
    for row, made in zip(rows, arm_rows(study, analyse(study)), strict=True):
        for key, value in made.items():
            if isinstance(value, float):
                assert number(row, key) == value


def test_the_folder_of_a_study_gives_the_same_report_and_all_files_are_there(full, tmp_path):
    study, files, _ = full
    again = write_report(study.folder, tmp_path, show=False)
    names = [file.relative_to(tmp_path).as_posix() for file in again.files]
    assert names == ["report.html", "report.md", "report.csv", "arms.csv", "figures"]
    assert all(file.exists() for file in again.files)
    for name in ("arms.csv", "report.csv", "figures/failures.svg"):
        assert (tmp_path / name).read_text() == (files.page.parent / name).read_text()
    shown = re.findall(r"!\[[^]]*\]\((\S+)\)", (tmp_path / "report.md").read_text())
    assert shown == [f"figures/{n}.svg" for n in ("failures", "final-loss", "loss", "timeline")]
    assert all((tmp_path / name).is_file() for name in shown)


def test_the_headline_holds_finite_figures_under_names_that_mlflow_takes(tmp_path):
    arms = {"none": Arm(num_failing=4), "ema": Arm(), "x": Arm(stability=[], fields="@rate-1+2")}
    study = synthetic.study(tmp_path, arms)
    figures = headline(analyse(study))
    assert all(re.fullmatch(r"[A-Za-z0-9_./ -]+", name) for name in figures)
    assert figures["report/none/nonfinite_seeds"] == 4
    assert figures["report/none/nonfinite_batches"] == pytest.approx(4 * 20 / 6)
    (key,) = (key for key in figures if "rate" in key and key.endswith("/val_loss"))
    assert figures[key] == pytest.approx(2.1067, abs=1e-4)
    json.dumps(figures, allow_nan=False)


# ------------------------------------------------------------------ texts from runs


HOSTILE = "<script>alert('x')</script> & <img src=x onerror=y> | `z`"


def test_text_from_runs_is_text_wherever_it_stands(tmp_path):
    incident = {"step": 300, "module": HOSTILE, "cause": HOSTILE, "line": HOSTILE}
    record = {"notes": [HOSTILE], "incident": incident, "git_sha": HOSTILE[:10]}
    arms = {
        "none": Arm(num_failing=1, record=record),
        "a": Arm(stability=[], fields="@text-a&b<i>", config={"recipe.schedule": HOSTILE}),
    }
    study = synthetic.study(tmp_path, arms, seeds=2)
    study.sweeps[0]["command"] = HOSTILE
    files, page = report(study, tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "i"}
    assert page.source.count("&lt;script&gt;alert") >= 5
    assert any("text-a&b<i>" in row[0] for row in page.table("What happened"))
    assert page.table("Differences")[0][3] == HOSTILE
    # Inside a block of code Markdown knows no elements.
    markdown = re.sub(r"```.*?```", "", files.page.with_suffix(".md").read_text(), flags=re.S)
    assert not re.search(r"<(script|img|i)\b", markdown)
    assert "&lt;script&gt;alert" in markdown
    # A bar in a text begins no column.
    lines = [line for line in markdown.splitlines() if "alert" in line and line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5, 7, 12}
    for drawing in files.page.parent.glob("figures/*.svg"):
        ET.parse(drawing)


def test_a_command_cannot_end_its_block_of_code(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    study.sweeps[0]["command"] = "one\n```\n# heading"
    files, _ = report(study, tmp_path)
    assert files.page.with_suffix(".md").read_text().count("```") == 2


def test_nothing_is_loaded_from_outside(full):
    _, _, page = full
    assert "http" not in page.source
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "use", "image"}
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "style", "onclick", "xlink:href"} & set(attrs), tag
    assert not re.search(r"url\(|@import|@font-face", page.source)


# ------------------------------------------------------------------ whatever there is


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
    assert not re.search(r"\bnan\b|\bNone\b", page.source.replace("first NaN", ""))
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


def test_two_hundred_runs_take_less_than_twenty_seconds(tmp_path):
    arms = {"none": Arm(num_failing=6)}
    arms |= {f"clip{i:02}": Arm(num_failing=i % 7, batches=100) for i in range(33)}
    study = synthetic.study(tmp_path, arms)
    assert len(study.runs) == 204
    before = time.monotonic()
    _, page = report(study.folder, tmp_path)
    assert time.monotonic() - before < 20
    assert len(page.table("What happened")) == 34


# ------------------------------------------------------------------ the command


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
        ([], ["study", "no value yet"]),
        (["study=nothing"], ["study=nothing", "runs", "allowed: synthetic"]),
        (["study=null"], ["study=null"]),
        (["study=[a]"], ["study=", "text"]),
        (["study=../runs"], ["study=../runs", "not a path"]),
        (["study=synthetic", "out=file"], ["out=file", "cannot be written"]),
        (["study=synthetic", "out=[a]"], ["out=", "text"]),
        (["study=synthetic", "paths.runs=nowhere"], ["study=synthetic", "nowhere", "none yet"]),
        (["study=synthetic", "paths=3"], ["paths=3", "wrong type"]),
        (["stduy=synthetic"], ["stduy", "unknown field"]),
        (["-m", "study=synthetic"], ["--multirun", "src.report"]),
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


def test_a_damaged_record_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    (study.runs[0].folder / "record.json").write_text("{")
    assert main(["study=synthetic"]) == 2
    assert "record.json: is damaged" in capsys.readouterr().err


def test_the_same_as_a_process_of_its_own(tmp_path):
    synthetic.study(tmp_path, {"none": Arm()}, seeds=1)
    process = start("report", ["study=nothing"], tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: study=nothing")
