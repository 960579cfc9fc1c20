"""What charts, and the tables beside them, are made from: every run is a point."""

import math
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import pandas as pd
import pytest

from src.common import number_format
from src.common.chart_library import altair as alt
from src.study.analysis.analyse import analyse
from src.study.analysis.expert_loads import all_loads, sampling_floor
from src.study.report import chart_data, charts, draw
from src.study.report.load_table import load_table
from src.study.report.loss_over_run import (
    first_large_norm,
    loss_over_run_table,
    nearest,
    validations,
)
from src.study.report.sections import CHARTS, Findings
from src.study.report.table import MARK
from tests.study import synthetic
from tests.study.synthetic import Arm

pytestmark = pytest.mark.drawn


def findings(study, folder=None):
    return Findings(study=study, analysis=analyse(study), folder=folder or study.folder)


def rows_of(make, study):
    """What a chart of the study is drawn from."""
    found = findings(study)
    return make(study, found.analysis, found.facts)


# ------------------------------------------------------------------ every point is shown


def test_a_chart_of_a_large_study_is_drawn():
    """The curves of 300 runs with 20 validations each."""
    rows = pd.DataFrame({"step": range(6000), "loss": 2.0})
    chart = alt.Chart(rows, description="many").mark_line().encode(x="step:Q", y="loss:Q")
    assert "<svg" in draw.DrawnChart(chart).svg


@pytest.mark.parametrize(("loss", "arrows"), [((2.3, 2.31, 2.32, 2.33), 0), ((2.3, 2.4), 2)])
def test_an_interval_that_is_cut_at_the_edge_ends_in_an_arrow(loss, arrows):
    """Two seeds give an interval many times as wide as their distance."""
    study = synthetic.in_memory({"none": Arm(loss=loss)}, seeds=len(loss))
    chart = CHARTS["final-loss"](findings(study)).to_dict()
    marks = [layer["mark"] for layer in chart["layer"]]
    triangles = [mark for mark in marks if str(mark.get("shape", "")).startswith("triangle-")]
    assert len(triangles) == arrows


def test_every_run_is_a_point_in_both_key_charts():
    arms = {"none": Arm(num_failing=3), "shaken": Arm(repeats=2), "ema": Arm(seeds=[1, 2])}
    study = synthetic.in_memory(arms, seeds=4)
    names = sorted(run.name for run in study.runs)
    assert len(names) == 4 + 8 + 2
    for make in (chart_data.failures, chart_data.final_losses):
        assert sorted(rows_of(make, study)["run"]) == names
    drawn = draw.DrawnChart(CHARTS["failures"](findings(study))).svg
    symbols = re.findall(r'<path transform="[^"]*" d="M[^"]*" fill="#[^"]*" stroke="#', drawn)
    assert len(symbols) == len(names)


def test_a_run_without_a_final_loss_is_no_point_of_the_losses_but_one_of_the_failures():
    study = synthetic.in_memory({"none": Arm(num_failing=1, nonfinite_frac=1.0)}, seeds=[0])
    assert CHARTS["final-loss"](findings(study)) is None
    (value,) = rows_of(chart_data.failures, study)["value"]
    assert value == 20


def test_batches_are_counted_from_where_the_arm_acts_beside_the_same_of_the_baseline():
    arms = {
        "none": Arm(nonfinite=[[100, 300, 301]]),
        "warmdown": Arm(nonfinite=[[100, 350]], acts_from=240),
    }
    points = rows_of(chart_data.failures, synthetic.in_memory(arms, seeds=1))
    assert list(points["value"]) == [3, 1]
    # Two of the baseline's three come after step 240; the run is pale.
    assert list(points["of_baseline"]) == [number_format.NONE, "2"]
    assert list(points["opacity"]) == [1.0, 0.35]


def test_seeds_keep_their_height_in_every_row():
    arms = {"none": Arm(), "ema": Arm(seeds=[2, 0])}
    points = rows_of(chart_data.failures, synthetic.in_memory(arms, seeds=3))
    assert points.groupby("seed")["place"].nunique().eq(1).all()
    assert points["place"].nunique() == 3
    assert points["place"].between(0, 0.95, inclusive="neither").all()


def test_outcomes_differ_in_shape_and_not_in_colour_alone():
    shapes = [shape for shape, *_ in charts.MARKERS.values()]
    assert len(set(shapes)) == len(shapes) == 5
    study = synthetic.in_memory(
        {"none": Arm(num_failing=1), "ema": Arm(status="unfinished")}, seeds=2
    )
    spec = CHARTS["failures"](findings(study)).to_dict()
    domain = spec["layer"][-1]["encoding"]["shape"]["scale"]["domain"]
    outcomes = chart_data.OUTCOMES
    assert domain == [outcomes["clean"], outcomes["intermittent"], chart_data.OTHER]


def test_a_long_label_is_broken_before_a_field_and_loses_nothing():
    label = "noise@learning_rate-0.003@weight_decay-0.1@scale-gradient_rms"
    lines = chart_data.wrapped(label, "A/A control", "").split("\n")
    assert "".join(lines[:-1]) == label and lines[-1] == "A/A control"
    assert all(line.startswith("@") for line in lines[1:-1])
    assert max(map(len, lines)) <= chart_data.LABEL_WIDTH
    assert chart_data.wrapped("short") == "short"


# ------------------------------------------------------------------ loss over the run


def with_lines(study, change):
    for run in study.runs:
        for line in run.lines:
            change(run, line)
    return study


def test_a_validation_without_a_finite_window_is_a_gap_in_the_line():
    study = synthetic.in_memory({"none": Arm()}, seeds=1)

    def lose(run, line):
        if line["step"] in (200, 240):
            line.pop("val/loss", None)
            line["val/nonfinite_frac"] = 1.0

    curves = rows_of(chart_data.loss_curves, with_lines(study, lose))
    line = curves[curves["part"] == "run"].set_index("step")["loss"]
    assert list(line.index[line.isna()]) == [200, 240]
    assert len(line) == 11
    drawn = draw.DrawnChart(charts.loss_curves(curves)).svg
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-width="0.9"', drawn)
    assert path.count("M") == 2


def test_damaged_validations_are_crossed_and_the_baseline_stands_behind_every_arm():
    study = synthetic.in_memory({"none": Arm(num_failing=1), "ema": Arm()}, seeds=2)
    curves = rows_of(chart_data.loss_curves, study)
    none, ema = (curves[curves["panel"].str.startswith(arm)] for arm in ("none", "ema"))
    # Validations at and after step 300, every 40 steps to 440.
    assert list(none.dropna(subset="nonfinite")["step"]) == [320, 360, 400, 440]
    assert ema["nonfinite"].isna().all()
    lines = [panel[panel["part"] == "run"].groupby("side")["line"] for panel in (none, ema)]
    assert [dict(each.nunique()) for each in lines] == [{"arm": 2}, {"arm": 2, "baseline": 2}]


def test_a_loss_that_blew_up_does_not_flatten_the_others():
    study = synthetic.in_memory({"none": Arm(loss=(2.0, 2.1)), "ema": Arm(loss=(2.0, 2.1))})

    def blow_up(run, line):
        if run.seed == 0 and line["step"] == 440 and "ema" in run.variant:
            line["val/loss"] = 1e6

    assert rows_of(chart_data.loss_curves, with_lines(study, blow_up))["loss"].max() < 10


def test_elevenths_are_means_of_the_nearest_validations():
    study = synthetic.in_memory({"none": Arm(loss=(2.0, 2.2))}, seeds=2)
    (row,) = loss_over_run_table(study, analyse(study), title="").rows
    expected = [sum(run.curve("val/loss")[k][1] for run in study.runs) / 2 for k in range(11)]
    assert [cell.text for cell in row[1:12]] == [f"{value:.3f}" for value in expected]
    assert row[12].text == "best 2.100 at step 440"


def test_elevenths_are_marked_and_noted_as_in_the_write_up():
    study = synthetic.in_memory({"none": Arm(num_failing=1), "early_stop": Arm(steps=280)}, seeds=2)

    def spike(run, line):
        if "none" in run.variant and run.seed == 1 and line["step"] >= 240:
            line["spike/norm_over_100"] = 2.0
            run.record["spikes"] |= {"norm_over_100": 2}

    none, stopped = loss_over_run_table(with_lines(study, spike), analyse(study), title="").rows
    assert [MARK in cell.text for cell in none[1:12]] == [False] * 7 + [True] * 4
    notes = none[12].text.split("; ")
    assert notes[0].endswith("at step 280")
    assert notes[1:] == ["norm above 100 by step 240 (seed 1)", "first NaN at step 300 (seed 0)"]
    assert [cell.text for cell in stopped[8:12]] == [number_format.NONE] * 4
    assert stopped[7].text != number_format.NONE


def test_the_one_norm_over_100_is_named_by_its_own_step():
    study = synthetic.in_memory({"none": Arm()}, seeds=1)
    (run,) = study.runs
    assert first_large_norm(run) is None
    for line in run.lines:
        line["spike/norm_over_100"] = float(line["step"] >= 240)
    run.record["spikes"] |= {"norm_over_100": 1, "grad_norm_max": 121.5, "grad_norm_max_step": 213}
    assert first_large_norm(run) == 213


def test_no_validation_near_is_none():
    study = synthetic.in_memory({"none": Arm()}, seeds=1)
    found = validations(study.runs[0], "val/loss")
    assert [v.step for v in found] == [40 * k for k in range(1, 12)]
    assert nearest(found, step=101, within=20).step == 120
    assert nearest(found, step=100, within=10) is None
    assert nearest([], step=100, within=10) is None


# ------------------------------------------------------------------ timeline


def spans_of(study):
    found = findings(study)
    return chart_data.timeline(study, found.analysis, found.facts, width=charts.TIMELINE_WIDTH)


def test_the_timeline_shows_every_step_that_failed_and_every_other_spike():
    arm = Arm(nonfinite=[[10, 11, 12, 200], []], spikes=[[50, 10], [60, 70]])
    spans = spans_of(synthetic.in_memory({"none": arm}, seeds=2))
    # Steps side by side are one bar; a spike that was not finite is a bar alone.
    starts = {part: list(own["start"]) for part, own in spans.groupby("part")}
    assert starts == {"run": [0, 0], "nonfinite": [10, 200], "spike": [50, 60, 70]}
    assert list(spans["note"].dropna()) == ["4 non-finite, 1 spike", "2 spikes"]


def test_the_timeline_tells_runs_that_ended_early_and_runs_that_did_not_end():
    arms = {"early_stop": Arm(steps=280), "ema": Arm(status="killed", steps=200)}
    notes = spans_of(synthetic.in_memory(arms, seeds=1))["note"].dropna()
    assert list(notes) == ["ends at step 280", "killed at step 200"]


# ------------------------------------------------------------------ load


def routed(study):
    """With loads of two layers, collapsed before the last quarter of the run and even in it."""

    def load(run, line):
        even = line["step"] > 330
        for layer in (0, 10):
            line[f"moe/layer_{layer}/load_min"] = 0.3 if even else 0.0
            line[f"moe/layer_{layer}/load_max"] = 0.5 if even else 1.0
            line[f"moe/layer_{layer}/load_expected"] = 0.4
            line[f"moe/layer_{layer}/max_violation"] = 0.25 if even else 1.5

    return with_lines(study, load)


def test_loads_are_those_of_the_last_quarter():
    study = routed(synthetic.in_memory({"none": Arm()}, seeds=2))
    arms = all_loads(study, analyse(study))
    table = load_table(arms, study, title="")
    assert [[cell.text for cell in row[:6]] for row in table.rows] == [
        ["none", layer, "0.4000", "0.300", "0.500", "0.25"] for layer in ("0", "10")
    ]
    layers = chart_data.router_loads(arms)
    assert list(layers["high"]) == [0.5, 0.5]
    assert set(layers["panel"]) == {"none\nhighest MaxVio 0.25"}


def test_models_without_experts_have_no_loads():
    study = synthetic.in_memory({"none": Arm()}, seeds=1)
    with_lines(study, lambda run, line: [line.pop(k) for k in list(line) if k.startswith("moe/")])
    assert all_loads(study, analyse(study)) == []
    assert CHARTS["load"](findings(study)) is None


def test_the_sampling_floor_is_that_of_the_batch():
    (run,) = synthetic.in_memory({"none": Arm()}, seeds=1).runs
    assert sampling_floor(run) == pytest.approx(1.35 * math.sqrt((5 / 2 - 1) / 512))


# ------------------------------------------------------------------ files and digits


def everything():
    """A study of which every chart can be drawn, with hostile names."""
    rates = {
        f"x{rate}": Arm(stability=[], fields=f"@learning_rate-{rate}", baseline=None)
        for rate in (0.001, 0.01, 0.1)
    }
    for name, arm in rates.items():
        arm.config["recipe.learning_rate"] = float(name[1:])
    hostile = Arm(num_failing=1, stability=["ema"], fields='@a-<b>&"c"')
    return routed(synthetic.in_memory({"none": Arm(num_failing=2), "x": hostile, **rates}, seeds=2))


@pytest.fixture(scope="module")
def all_charts():
    found = findings(everything())
    return {name: make(found) for name, make in CHARTS.items()}


def test_charts_are_files_of_their_own_with_hostile_names_too(all_charts, tmp_path):
    (tmp_path / "mine.svg").write_text("made by hand")
    for name, chart in all_charts.items():
        drawn = draw.DrawnChart(chart)
        drawn.save(tmp_path, name)
        # What a page holds for its script can end no element.
        (script,) = re.findall(r"<script[^>]*>(.*)</script>", drawn.figure(), re.S)
        assert "<" not in script
        text = (tmp_path / f"{name}.svg").read_text()
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.get("width")) > 0 and root.get("aria-label")
        assert "<b>" not in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "mine.svg").read_text() == "made by hand"


def test_the_same_data_give_the_same_bytes(all_charts, drawings):
    again = findings(everything())
    for name, chart in all_charts.items():
        first = draw.DrawnChart(chart).svg
        drawings.clear()
        assert draw.DrawnChart(CHARTS[name](again)).svg == first, name


def test_every_chart_keeps_to_the_schema_and_says_what_it_shows(all_charts):
    assert set(all_charts) == {
        "failures", "final-loss", "learning-rate", "loss", "timeline", "load"
    }  # fmt: skip
    for name, chart in all_charts.items():
        assert isinstance(chart, alt.TopLevelMixin)
        assert chart.to_dict(validate=True)["description"], name


def test_every_colour_of_a_page_follows_light_and_dark(all_charts):
    css = (draw.TEMPLATES / "report.css").read_text()
    for colour, name in draw.PAGE_COLOURS.items():
        # Once for each of the two.
        assert css.count(f"--{name}: #") == 2 and f"--{name}: {colour};" in css
    for name, chart in all_charts.items():
        left = re.findall(r'(?:fill|stroke)="(#\w+|white|black)"', draw.DrawnChart(chart).figure())
        assert not left, name


def test_a_click_leads_from_the_page_to_the_run_and_from_a_file_nowhere(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(num_failing=1)}, seeds=2)
    chart = draw.DrawnChart(CHARTS["failures"](findings(study, study.folder / "report")))
    (rows,) = (rows for rows in chart.spec["datasets"].values() if "link" in rows[0])
    folders = [(study.folder / "report" / unquote(row["link"])).resolve() for row in rows]
    assert folders == [run.folder.resolve() for run in study.runs]
    assert "href" not in chart.svg


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number_format.fixed(None), number_format.NONE),
        (number_format.fixed(math.nan), number_format.NONE),
        (number_format.fixed(-0.0004), "0.000"),
        (number_format.fixed(-1234.5, 1), f"{number_format.MINUS}1,234.5"),
        (number_format.fixed(math.inf), number_format.INFINITY),
        (number_format.signed(0.02), "+0.020"),
        (number_format.signed(0.0001), "0.000"),
        (number_format.between(1.0, 2.0, 0), "1 to 2"),
        (number_format.between(1.0, 1.001, 1), "1.0"),
        (number_format.between(None, 1.0), ""),
        (number_format.p_value(0.0001), "<0.001"),
        (number_format.p_value(0.0312), "0.031"),
        (number_format.compact(66_560), "66.6 k"),
        (number_format.compact(999_960), "1000 k"),
        (number_format.compact(1.1e11, "FLOP"), "110 GFLOP"),
        (number_format.steps([90, 70, 82]), "70, 82, 90"),
        (number_format.steps([1, 2, 3, 1234]), "1 to 1,234"),
        (number_format.steps([280, 280, 280, 280]), "280"),
        (number_format.steps([]), number_format.NONE),
        (number_format.p_equals(0.0001), "< 0.001"),
        (number_format.p_equals(0.0312), "= 0.031"),
        (number_format.metric_safe("none@rate-1+2"), "none_rate-1_2"),
    ],
)
def test_figures_as_text(shown, expected):
    assert shown == expected


def test_an_arm_that_never_acts_is_not_said_to_act_at_its_end():
    study = synthetic.in_memory({"none": Arm(), "ema": Arm(acts_from=440)}, seeds=2)
    spans = spans_of(study)
    panels = " ".join(spans["panel"]).replace("\n", " ")
    assert "trains as its baseline does" in panels and "acts after" not in panels
    assert "start" not in set(spans["part"])
