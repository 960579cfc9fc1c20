"""What figures and the tables beside them draw from runs."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from src.common import number_format
from src.study.analysis.analyse import analyse
from src.study.report import figures, svg
from src.study.report.curves import loss_curves
from src.study.report.elevenths import elevenths_table, first_large_norm, nearest, validations
from src.study.report.router_load import all_loads, load_drawings, load_table, sampling_floor
from src.study.report.table import MARK
from src.study.report.timeline import timeline
from tests.study import synthetic
from tests.study.synthetic import Arm


def hints(drawing) -> list[str]:
    """What the points say under the mouse."""
    return re.findall(r"<title>(.*?)</title>", drawing.svg())


# ------------------------------------------------------------------ every point is shown


def test_every_run_is_a_point_in_both_key_figures():
    arms = {"none": Arm(num_failing=3), "shaken": Arm(repeats=2), "ema": Arm(seeds=[1, 2])}
    study = synthetic.in_memory(arms, seeds=4)
    analysis = analyse(study)
    names = sorted(run.name for run in study.runs)
    assert len(names) == 4 + 8 + 2
    for drawing in (
        figures.failures(study, analysis),
        figures.final_losses(study, analysis),
    ):
        assert sorted(hint.partition(": ")[0] for hint in hints(drawing)) == names


def test_a_run_without_a_final_loss_is_no_point_of_the_losses_but_one_of_the_failures():
    study = synthetic.in_memory({"none": Arm(num_failing=1, nonfinite_frac=1.0)}, seeds=[0])
    analysis = analyse(study)
    assert figures.final_losses(study, analysis) is None
    assert hints(figures.failures(study, analysis)) == [
        f"{study.runs[0].name}: 20 non-finite batches"
    ]


def test_batches_are_counted_from_where_the_arm_acts_beside_the_same_of_the_baseline():
    arms = {
        "none": Arm(nonfinite=[[100, 300, 301]]),
        "warmdown": Arm(nonfinite=[[100, 350]], acts_from=240),
    }
    study = synthetic.in_memory(arms, seeds=1)
    drawing = figures.failures(study, analyse(study))
    assert [hint.rpartition(": ")[2] for hint in hints(drawing)] == [
        "3 non-finite batches",
        "1 non-finite batches",
    ]
    # Two of the baseline's three come after step 240: a grey stroke, and the run pale.
    (stroke,) = re.findall(
        r'<line x1="([\d.]+)"[^>]*stroke="#9aa0a6" stroke-width="1.6"', drawing.body
    )
    axis = {
        text: float(x)
        for x, text in re.findall(
            r'x="([\d.]+)"[^>]*text-anchor="middle"[^>]*>(\d+)<', drawing.body
        )
    }
    assert axis["1"] < float(stroke) < axis["3"]
    assert drawing.body.count('<g opacity="0.35">') == 1


def test_outcomes_differ_in_shape_and_not_in_colour_alone():
    shapes = [shape for shape, *_ in (*figures.MARKERS.values(), figures.OTHER)]
    assert len(set(shapes)) == len(shapes) == 5
    study = synthetic.in_memory(
        {"none": Arm(num_failing=1), "ema": Arm(status="unfinished")}, seeds=2
    )
    words = [words for _, words in figures.legend(study)]
    assert words == ["clean", figures.MARKERS["intermittent"][3], figures.OTHER[3]]


# ------------------------------------------------------------------ loss over the run


def strokes(drawing) -> list[str]:
    """The paths of the thin lines, one a run, baseline first."""
    return re.findall(
        r'<path d="([^"]*)" fill="none" stroke="[^"]*" stroke-width="0.9"', drawing.body
    )


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

    (before,) = loss_curves(study, analyse(study))
    (after,) = loss_curves(with_lines(study, lose), analyse(study))
    assert [path.count("M") for path in strokes(before)] == [1]
    assert [path.count("M") for path in strokes(after)] == [2]
    numbers = [len(re.findall(r"[\d.]+", *strokes(drawing))) for drawing in (before, after)]
    assert numbers == [2 * 11, 2 * (4 + 5)]


def test_damaged_validations_are_crossed_and_the_baseline_stands_behind_every_arm():
    study = synthetic.in_memory({"none": Arm(num_failing=1), "ema": Arm()}, seeds=2)
    none, ema = loss_curves(study, analyse(study))
    # Validations at and after step 300, every 40 steps to 440.
    assert [hint for hint in hints(none) if "50%" in hint] == [
        f"step {step}: 50% of windows non-finite" for step in (320, 360, 400, 440)
    ]
    assert len(strokes(none)) == 2
    assert len(strokes(ema)) == 4
    assert hints(ema) == []


def test_a_loss_that_blew_up_does_not_flatten_the_others():
    study = synthetic.in_memory({"none": Arm(loss=(2.0, 2.1)), "ema": Arm(loss=(2.0, 2.1))})

    def blow_up(run, line):
        if run.seed == 0 and line["step"] == 440 and "ema" in run.variant:
            line["val/loss"] = 1e6

    panels = loss_curves(with_lines(study, blow_up), analyse(study))
    ticks = [float(t) for t in re.findall(r'text-anchor="end">([\d.]+)<', panels[0].body)]
    assert max(ticks) < 10


def test_elevenths_are_means_of_the_nearest_validations():
    study = synthetic.in_memory({"none": Arm(loss=(2.0, 2.2))}, seeds=2)
    (row,) = elevenths_table(study, analyse(study), title="").rows
    expected = [sum(run.curve("val/loss")[k][1] for run in study.runs) / 2 for k in range(11)]
    assert [cell.text for cell in row[1:12]] == [f"{value:.3f}" for value in expected]
    assert row[12].text == "best 2.100 at step 440"


def test_elevenths_are_marked_and_noted_as_in_the_write_up():
    study = synthetic.in_memory({"none": Arm(num_failing=1), "early_stop": Arm(steps=280)}, seeds=2)

    def spike(run, line):
        if "none" in run.variant and run.seed == 1 and line["step"] >= 240:
            line["spike/norm_over_100"] = 2.0
            run.record["spikes"] |= {"norm_over_100": 2}

    none, stopped = elevenths_table(with_lines(study, spike), analyse(study), title="").rows
    assert [MARK in cell.text for cell in none[1:12]] == [False] * 7 + [True] * 4
    notes = none[12].text.split("; ")
    assert notes[0].endswith("at step 280")
    assert notes[1:] == ["norm over 100 by step 240 (seed 1)", "first NaN in step 300 (seed 0)"]
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


def test_the_timeline_shows_every_step_that_failed_and_every_other_spike():
    arm = Arm(nonfinite=[[10, 11, 12, 200], []], spikes=[[50, 10], [60, 70]])
    study = synthetic.in_memory({"none": arm}, seeds=2)
    drawing = timeline(study, analyse(study))
    bars = re.findall(rf'<path d="([^"]*)" fill="{svg.VERMILLION}"', drawing.body)
    flags = re.findall(rf'<path d="([^"]*)" fill="{svg.BLUE}"', drawing.body)
    # Steps side by side are one bar; a spike that was not finite is a bar alone.
    assert [path.count("M") for path in bars] == [2]
    assert [path.count("M") for path in flags] == [1, 2]
    assert "4 non-finite, 1 spike<" in drawing.body
    assert ">2 spikes<" in drawing.body


def test_the_timeline_tells_runs_that_ended_early_and_runs_that_did_not_end():
    arms = {"early_stop": Arm(steps=280), "ema": Arm(status="killed", steps=200)}
    study = synthetic.in_memory(arms, seeds=1)
    body = timeline(study, analyse(study)).body
    assert "ends at step 280" in body
    assert "killed at step 200" in body


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


def test_loads_are_those_of_the_last_quarter_and_the_mean_is_called_an_identity():
    study = routed(synthetic.in_memory({"none": Arm()}, seeds=2))
    arms = all_loads(study, analyse(study))
    table = load_table(arms, study, title="")
    assert [[cell.text for cell in row[:6]] for row in table.rows] == [
        ["none", layer, "0.4000", "0.300", "0.500", "0.25"] for layer in ("0", "10")
    ]
    assert "identity" in table.remarks[0]
    (drawing,) = load_drawings(arms)
    assert "MaxVio 0.25" in drawing.body


def test_models_without_experts_have_no_loads():
    study = synthetic.in_memory({"none": Arm()}, seeds=1)
    with_lines(study, lambda run, line: [line.pop(k) for k in list(line) if k.startswith("moe/")])
    assert all_loads(study, analyse(study)) == []


def test_the_sampling_floor_is_that_of_the_batch():
    (run,) = synthetic.in_memory({"none": Arm()}, seeds=1).runs
    assert sampling_floor(run) == pytest.approx(1.35 * math.sqrt((5 / 2 - 1) / 512))


# ------------------------------------------------------------------ drawing and digits


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        *((0, high, log) for high in (1, 3, 440, 11_000) for log in (False, True)),
        (2.1, 2.13, False),
        (-3, 7, False),
    ],
)
def test_a_scale_keeps_order_and_its_ticks_lie_within(low, high, log):
    scale = svg.Scale(low=low, high=high, start=100, end=10, log=log)
    ticks = scale.ticks(7)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0] and ticks[-1] <= high
    places = [scale(tick) for tick in ticks]
    assert places == sorted(places, reverse=True)
    assert (scale(low), scale(high), scale(high * 9 + 9), scale(low - 5)) == (100, 10, 10, 100)


def test_a_scale_without_extent_draws_in_its_middle():
    scale = svg.Scale(low=2, high=2, start=0, end=10)
    assert scale(2) == 5
    assert scale.ticks(5) == [2]


def test_drawings_are_files_of_their_own_with_hostile_names_too(tmp_path):
    arms = {"none": Arm(num_failing=2), "x": Arm(stability=[], fields='@a-<b>&"c"')}
    study = routed(synthetic.in_memory(arms, seeds=2))
    analysis = analyse(study)
    drawings = {
        "failures": figures.failures(study, analysis),
        "timeline": timeline(study, analysis),
        "loss": svg.together(loss_curves(study, analysis), columns=2),
        "load": svg.together(load_drawings(all_loads(study, analysis)), columns=1),
    }
    (tmp_path / "mine.svg").write_text("somebody's own")
    figures.save(drawings, tmp_path)
    assert (tmp_path / "mine.svg").read_text() == "somebody's own"
    for file in (tmp_path / f"{name}.svg" for name in drawings):
        root = ET.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.get("width")) > 0 and float(root.get("height")) > 0
    two, one = drawings["loss"], drawings["load"]
    assert two.width > one.width and one.height > two.height


def test_long_labels_are_cut_in_their_middle():
    assert svg.fitted("short", 100) == "short"
    cut = svg.fitted("none@learning_rate-0.003@weight_decay-0.1", 120)
    assert len(cut) < 20
    assert cut.startswith("none@") and cut.endswith("0.1")


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
        (number_format.steps([]), number_format.NONE),
        (number_format.metric_safe("none@rate-1+2"), "none_rate-1_2"),
    ],
)
def test_figures_as_text(shown, expected):
    assert shown == expected
