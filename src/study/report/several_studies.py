"""The report over several studies: what each arm does in each of them, side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from src.common import number_format
from src.common.chart_library import altair as alt
from src.study.analysis.analyse import analyse
from src.study.analysis.answer_without_failures import nothing_fails
from src.study.analysis.results import Analysis, ArmResult, Comparison
from src.study.analysis.verdicts import fraction, listed
from src.study.read.collect import Study
from src.study.report.comparison_page import write_page
from src.study.report.draw import BLUE, GREY, VERMILLION, DrawnChart
from src.study.report.provenance import differing_settings, settings_table
from src.study.report.table import Cell, Column, Table, cell

SIGNIFICANT = "significant"
"""The mark of a significant difference; a colour alone would not be seen by everybody."""


def write_studies(studies: Sequence[Study], out: Path, *, family: str) -> None:
    """Writes report.html and arms.csv, and prints answers and tables.

    Every study is analysed by itself: its arms are compared with its own untreated runs.

    Args:
        studies: two or more.
        out: the folder.
        family: the arms over which p is adjusted, within each study.

    Raises:
        InputError: the folder cannot be written.
    """
    analyses = [analyse(study, family=family) for study in studies]
    answer = [
        f"{analysis.study}: {sentence}" for analysis in analyses for sentence in analysis.answer[:3]
    ]
    if all(nothing_fails(analysis.arms) for analysis in analyses):
        chart = _chart(analyses, "loss", "difference in the final validation loss")
        lower = "the loss is lower than the baseline's"
        tables = [losses_table(analyses), failures_table(analyses)]
    else:
        chart = _chart(analyses, "nonfinite", "difference in the share of failing runs")
        lower = "fewer runs fail than untreated ones"
        tables = [failures_table(analyses), losses_table(analyses)]
    write_page(
        out,
        name=" and ".join(analysis.study for analysis in analyses),
        answer=[*answer, *_unlike(studies)],
        chart=DrawnChart(chart),
        caption=f"Below 0, {lower}; lines are 95 % intervals.",
        tables=[*tables, settings_table(studies, title="Settings in which the studies differ")],
        arms=_rows(analyses),
    )


def _unlike(studies: Sequence[Study]) -> list[str]:
    """A sentence that names the settings in which the studies differ, if they do."""
    fields = differing_settings(studies)
    if not fields:
        return []
    return [
        f"The studies differ in {listed(fields)}: an arm may do something else in another study"
        " because of that."
    ]


def failures_table(analyses: Sequence[Analysis]) -> Table:
    """A row for each arm, with its failing runs and the untreated ones in each study."""

    def shown(arm: ArmResult) -> Cell:
        primary = arm.comparisons.get("nonfinite")
        if primary is None:
            return cell(fraction(arm.nonfinite), "baseline")
        untreated = arm.untreated_nonfinite
        against = "" if untreated is None else f"untreated {fraction(untreated)}"
        return cell(fraction(arm.nonfinite), against, _significance(primary))

    return _table(analyses, "Runs that go non-finite, by arm and study", shown)


def losses_table(analyses: Sequence[Analysis]) -> Table:
    """A row for each arm, with the difference of its loss from the baseline's in each study."""

    def shown(arm: ArmResult) -> Cell:
        loss = arm.comparisons.get("loss")
        if loss is None or loss.difference is None:
            return Cell(number_format.NONE)
        ends = number_format.between(loss.difference.low, loss.difference.high)
        return cell(number_format.signed(loss.difference.mean), ends, _significance(loss))

    return _table(analyses, "Validation loss minus the baseline's, by arm and study", shown)


def _table(analyses: Sequence[Analysis], title: str, shown: Callable[[ArmResult], Cell]) -> Table:
    arms = [{arm.label: arm for arm in analysis.arms if arm.num_seeds} for analysis in analyses]
    labels = dict.fromkeys(label for each in arms for label in each)
    rows = [
        [
            Cell(label),
            *(shown(each[label]) if label in each else Cell(number_format.NONE) for each in arms),
        ]
        for label in labels
    ]
    columns = [
        Column(name="arm", is_text=True),
        *(Column(name=analysis.study) for analysis in analyses),
    ]
    return Table(
        title=title,
        columns=columns,
        rows=[row for row in rows if any(entry.text != number_format.NONE for entry in row[1:])],
        remarks=["p is adjusted over the arms of each study (Holm), not over studies."],
        is_grid=True,
    )


def _significance(comparison: Comparison) -> str:
    if comparison.p_value is None:
        return ""
    p = f"p {number_format.p_equals(comparison.p_value)}"
    return f"{p}, {SIGNIFICANT}" if comparison.detected else p


def _chart(analyses: Sequence[Analysis], endpoint: str, title: str) -> alt.Chart:
    """The difference from untreated runs, by arm and study, with its interval.

    Args:
        analyses: one per study.
        endpoint: nonfinite or loss.
        title: of the axis.
    """
    rows = [
        {
            "study": analysis.study,
            "arm": arm.label,
            "difference": found.difference.mean,
            "low": found.difference.low,
            "high": found.difference.high,
            "p": SIGNIFICANT if found.detected else "not significant",
        }
        for analysis in analyses
        for arm in analysis.arms
        if (found := arm.comparisons.get(endpoint)) is not None and found.difference is not None
    ]
    frame = pd.DataFrame(rows, columns=["study", "arm", "difference", "low", "high", "p"])
    names = list(dict.fromkeys(frame["arm"]))
    base = alt.Chart(frame).encode(
        y=alt.Y("arm:N", sort=names, title=None, axis=alt.Axis(grid=True, gridColor=GREY)),
        yOffset=alt.YOffset("study:N", sort=[analysis.study for analysis in analyses]),
        tooltip=["study:N", "arm:N", "difference:Q", "low:Q", "high:Q"],
    )
    bars = base.mark_rule().encode(x=alt.X("low:Q", title=title), x2="high:Q")
    points = base.mark_point(filled=True, size=60).encode(
        x=alt.X("difference:Q", title=title),
        shape=alt.Shape("study:N", title=None),
        color=alt.Color(
            "p:N",
            title=None,
            scale=alt.Scale(domain=[SIGNIFICANT, "not significant"], range=[VERMILLION, BLUE]),
        ),
    )
    layered: alt.Chart = (bars + points).properties(
        width=560, height=alt.Step(14), description=f"{title}, by arm and study"
    )
    return layered


def _rows(analyses: Sequence[Analysis]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for analysis in analyses:
        for arm in analysis.arms:
            primary, loss = arm.comparisons.get("nonfinite"), arm.comparisons.get("loss")
            untreated = arm.untreated_nonfinite
            rows.append(
                {
                    "study": analysis.study,
                    "arm": arm.label,
                    "failing_runs": arm.nonfinite.events,
                    "runs": arm.nonfinite.total,
                    "untreated_failing_runs": None if untreated is None else untreated.events,
                    "untreated_runs": None if untreated is None else untreated.total,
                    "p_value": None if primary is None else primary.p_value,
                    "loss_difference": None
                    if loss is None or loss.difference is None
                    else loss.difference.mean,
                    "loss_p_value": None if loss is None else loss.p_value,
                }
            )
    return rows
