"""What a report shows, whatever the study; that it shows runs' texts as text and loads nothing."""

import json
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import pandas as pd
import pytest

from src.common.number_format import NONE
from src.study.analysis.analyse import analyse
from src.study.analysis.frames import arms_frame, headline, runs_frame
from src.study.read.from_csv import read_frame, write_frame
from src.study.report.arms_table import arms_table
from src.study.report.make_report import write_report
from src.study.report.sections import SECTIONS
from src.study.report.table import MARK, arm_cell, setting
from src.study.report.tables import runs_table
from tests.study import synthetic
from tests.study.pages import ARMS, Page, full_report, report
from tests.study.synthetic import Arm


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of five arms and its report."""
    return full_report(tmp_path_factory.mktemp("full"))


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
    assert rows["router_eps"][0] == "router_eps|positive control"
    assert rows["router_eps"][3] == "0 of 6|untreated 6 of 6"
    assert rows["shaken"][0] == "shaken|A/A control|acts after step 240"
    assert "trains only to step 280" in rows["early_stop"][0]


def test_an_arm_that_never_acts_is_said_to_train_as_its_baseline():
    study = synthetic.in_memory({"none": Arm(), "ema": Arm(acts_from=440)}, seeds=2)
    rows = arms_frame(study, analyse(study)).to_dict("records")
    assert [arm_cell(row).asides for row in rows] == [
        ("baseline",),
        ("trains as its baseline does",),
    ]


def test_the_title_of_every_table_names_router_and_preset(full):
    study, files, page = full
    assert setting(study) == "ffn moe_writeup_add, preset stress"
    assert len(page.tables) >= 7
    for title in page.tables:
        assert "ffn moe_writeup_add, preset stress" in title
    titles = re.findall(r"^\*\*(.*)\*\*$", files.page.with_suffix(".md").read_text(), re.M)
    assert len(titles) >= 7
    assert all("ffn moe\\_writeup\\_add, preset stress" in title for title in titles)


def test_every_difference_has_the_range_of_the_aa_control(full):
    study, _, page = full
    arms = {arm.label: arm for arm in analyse(study).arms}
    rows = [*page.table("Failures and loss"), *page.table("Other endpoints")]
    # Every arm but the baseline, on each of six endpoints.
    assert len(rows) == 6 * (len(ARMS) - 1)
    endpoints = {"non-finite runs, share": "nonfinite", "val/loss": "loss", "spikes": "spikes"}
    checked = 0
    for row in rows:
        found = arms[row[0].split("|")[0]].comparisons.get(endpoints.get(row[1], ""))
        if found is not None:
            assert (row[4] == NONE) == (found.aa_range is None)
            assert (row[6] == NONE) == (found.smallest_p is None)
            assert (row[7] == "none") == (found.smallest_effect is None)
            assert row[8] == found.verdict
            checked += found.aa_range is not None and found.smallest_p is not None
    assert checked >= 4


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_a_loss_with_nonfinite_windows_is_marked_in_every_table(suffix, tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(num_failing=1, batches=3, loss=(2.222, 2.1))})
    report(study, tmp_path)
    text = (tmp_path / "out" / f"report.{suffix}").read_text()
    # The arm's, the seed's at the end, and the mean at the last eleventh.
    assert text.count(f"2.222{MARK}") == 2
    assert text.count(f"1 damaged: 2.222{MARK}") == 1
    mean = (3 * 2.222 + 3 * 2.1) / 6
    assert f"{mean:.3f}{MARK}" in text
    assert "some validation windows had no finite loss" in text


def test_nothing_is_marked_where_all_is_finite(tmp_path):
    _, page = report(synthetic.study(tmp_path, {"none": Arm()}), tmp_path)
    assert MARK not in page.source


def test_steps_that_were_shared_are_counted(full):
    _, files, page = full
    # Six seeds each: 240 of shaken and of warmdown, 280 of early_stop.
    said = "4,560 of 12,240 steps are shared with a baseline"
    assert said in page.source
    assert said in files.page.with_suffix(".md").read_text()


def test_differences_in_configuration_are_named_and_nothing_else(tmp_path):
    arms = {"none": Arm(), "clip03": Arm(config={"recipe.clip_norm": 0.3, "paths.cache": "x"})}
    _, page = report(synthetic.study(tmp_path, arms, seeds=1), tmp_path)
    assert page.table("Differences") == [
        ["clip03|baseline none", "recipe.clip_norm", "1.0", "0.3"],
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
        (link,) = (link for link in links if link.endswith(".html"))
        assert (files.page.parent / unquote(link)).resolve() == target.resolve()
    row = Page(files.page).table("What failed first")[0]
    assert row[:4] == ["none", "0", "300", "router underflow"]


def test_warnings_stand_beside_the_failures_that_they_foretold(tmp_path):
    alarm = {"step": 212, "metric": "moe/layer_0/picked_logit_min", "line": "step 212: it falls"}
    arms = {
        "none": Arm(num_failing=1, record={"alarms": [alarm]}),
        "ema": Arm(num_failing=1, first=320),
    }
    _, page = report(synthetic.study(tmp_path, arms, seeds=2), tmp_path)
    rows = page.table("Early warnings, by run")
    assert rows == [
        ["none", "0", "212", "300", "88|20% of the run", "it falls"],
        ["none", "1", "212", "never", NONE, "it falls"],
        ["ema", "0", NONE, "320", NONE, "no warning"],
    ]
    _, quiet = report(synthetic.study(tmp_path / "q", {"none": Arm()}, seeds=2), tmp_path / "q")
    assert "Early warnings" not in quiet.source


# ------------------------------------------------------------------ files


def test_figures_read_back_from_csv_are_those_of_the_page(full):
    _, files, page = full
    arms = read_frame(files.page.parent / "arms.csv")
    assert texts_of(arms_table(arms, title="")) == page.table("What happened")
    runs = read_frame(files.page.parent / "report.csv")
    assert len(runs) == 30
    assert texts_of(runs_table(runs, title="", links={})) == page.table("Every run")


def test_csv_keeps_full_precision(full):
    study, files, _ = full
    read = read_frame(files.page.parent / "arms.csv")
    made = arms_frame(study, analyse(study))
    floats = [name for name in made if any(isinstance(value, float) for value in made[name])]
    assert len(floats) > 20
    pd.testing.assert_frame_equal(read[floats], made[floats], check_exact=True)


def test_the_lines_of_runs_are_those_of_the_same_study_that_has_no_files(full, tmp_path):
    _, files, _ = full
    study = synthetic.in_memory(ARMS)
    write_frame(runs_frame(study, analyse(study)), tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_bytes() == files.page.with_suffix(".csv").read_bytes()


def test_the_folder_of_a_study_gives_the_same_report_and_all_files_are_there(full, tmp_path):
    study, files, _ = full
    again = write_report(study.folder, tmp_path, show=False)
    names = [file.relative_to(tmp_path).as_posix() for file in again.files]
    assert names == ["report.html", "report.md", "summary.md", "report.csv", "arms.csv", "figures"]
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
    assert figures["report/none/nonfinite_runs"] == 4
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
    assert not tags & {"img", "i"}
    # What is in a script element ends where the page ends it.
    for script in re.findall(r"<script type[^>]*>(.*?)</script>", page.source, re.S):
        assert json.loads(script)["$schema"]
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
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page.source, re.S)
    # One a chart, Vega once for all of them, and the few lines that draw.
    assert len(scripts) == page.source.count('<figure class="chart">') + 2 == 6
    assert sum("vegaEmbed" in script for script in scripts) == 2
    without = re.sub(r"<script.*?</script>", "", page.source, flags=re.S)
    assert "http" not in without
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "use", "image"}
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "style", "onclick", "xlink:href"} & set(attrs), tag
    assert not re.search(r"url\(|@import|@font-face", without)


def test_every_section_is_told_in_both_forms_and_in_one_order(full):
    _, files, page = full
    markdown = files.page.with_suffix(".md").read_text()
    headings = re.findall(r"^## (.*)$", markdown, re.M)
    # The first has no heading in the page: it stands at its top.
    assert re.findall(r"<h2 [^>]*>(.*)</h2>", page.source) == headings[1:]
    known = [section.heading for section in SECTIONS]
    assert headings[:-1] == [heading for heading in known if heading in headings]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    places = [f"#{attrs['id']}" for tag, attrs in page.tags if tag == "h2"]
    assert [link for link in links if link.startswith("#")] == places


def test_a_heading_is_not_repeated_above_a_table_or_a_chart(full):
    _, _, page = full
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", page.source)
    titles = re.findall(r'<p class="title">([^<]+)</p>', page.source)
    assert len(headings) > 5 and titles
    assert not {each.lower() for each in titles} & {each.lower() for each in headings}
    # The setting stands at the top, not in every title.
    assert not any("preset stress" in title for title in titles)
    for heading in headings:
        drawn = page.source[page.source.index(f">{heading}</h2>") :].partition("<h2")[0]
        assert f">{heading}</text>" not in drawn


def test_on_a_phone_a_row_is_a_card_that_names_every_value(full):
    _, _, page = full
    shown = {attrs["aria-label"]: attrs["class"] for tag, attrs in page.tags if tag == "table"}
    kinds = {title.partition(" (")[0]: kind for title, kind in shown.items()}
    assert kinds["What happened, by arm"] == kinds["Every run"] == "cards"
    assert kinds["Validation loss at each eleventh of the run"] == "grid"
    cells = [attrs for tag, attrs in page.tags if tag == "td"]
    assert all(attrs["data-name"] for attrs in cells)


def test_the_seed_of_a_run_leads_to_its_folder(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm()}, seeds=2)
    files, page = report(study, tmp_path)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "seed-" in attrs["href"]]
    found = [(files.page.parent / unquote(link)).resolve() for link in links]
    assert found == [run.folder.resolve() for run in study.runs]


def test_the_summary_is_the_answer_and_the_table(full):
    _, files, _ = full
    text = (files.page.parent / "summary.md").read_text()
    assert "6 of 6 runs go non-finite" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 5
    assert rows[0].startswith("| arm | outcomes | non-finite runs |")
    assert "- *" not in text
