"""The report of runs that were made elsewhere: the answer, a table and a chart in one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src.common import number_format
from src.common.chart_library import altair as alt
from src.common.errors import InputError, nearest
from src.study.analysis import outside
from src.study.analysis.outside import OutsideArm
from src.study.analysis.verdicts import fraction
from src.study.read.outside_runs import OutsideStudy
from src.study.report.comparison_page import write_page
from src.study.report.draw import BLUE, GREY, VERMILLION, DrawnChart
from src.study.report.table import Cell, Column, Table, cell

CONTROL_NAMES = ("none", "baseline", "control", "untreated", "default", "vanilla")


def controls_of(study: OutsideStudy, given: Any) -> list[str]:
    """The arms whose runs are untreated.

    Args:
        study: the runs.
        given: `control=`: a name, several, or None for an arm that is named like a control.

    Raises:
        InputError: there is no such arm, or none is named like a control.
    """
    listed = ", ".join(study.arms)
    if given is None:
        names = [arm for arm in study.arms if arm.lower() in CONTROL_NAMES]
    else:
        values = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
        names = list(dict.fromkeys(str(value) for value in values))
    shown = "null" if given is None else given
    if not names:
        raise InputError(f"control={shown}: name the untreated arm, one of {listed}")
    for name in names:
        if name not in study.arms:
            raise InputError(
                f"control={name}: no such arm; {nearest(name, study.arms)}arms: {listed}"
            )
    if len(names) == len(study.arms):
        raise InputError(f"control={shown}: leaves no arm to compare; arms: {listed}")
    return names


def write_comparison(study: OutsideStudy, control: Any, out: Path) -> None:
    """Writes report.html and arms.csv, and prints the answer and the table.

    Raises:
        InputError: the control is not an arm, or the folder cannot be written.
    """
    arms = outside.compare(study, controls_of(study, control))
    write_page(
        out,
        name=study.name,
        answer=outside.sentences(study, arms),
        chart=DrawnChart(_chart(study)),
        caption="Each point is a run; runs without a finite value have none.",
        tables=[comparison_table(study, arms)],
        arms=map(_row, arms),
    )


def comparison_table(study: OutsideStudy, arms: Sequence[OutsideArm]) -> Table:
    """One row per arm."""
    compared = outside.endpoints(study)
    of = {outside.FAILURES: "failing runs", outside.VALUES: study.endpoint}
    columns = [
        Column(name="arm", is_text=True),
        Column(name="seeds"),
        Column(name="failing runs", note="those without a finite value, or with one that says so"),
        *([] if study.is_failure else [Column(name=study.endpoint, note="of finite runs")]),
    ]
    for endpoint in compared:
        columns.append(
            Column(
                name=f"difference in {of[endpoint]}",
                note="from the control, on shared seeds, with 95 % interval",
            )
        )
    columns.append(Column(name="verdict", is_text=True, may_wrap=True))
    rows = []
    for arm in arms:
        row = [arm_cell(arm), Cell(str(arm.num_seeds)), Cell(fraction(arm.failed))]
        if not study.is_failure:
            row.append(_estimate(arm.mean, signed=False))
        found = [arm.effects.get(endpoint) for endpoint in compared]
        row += [_estimate(effect and effect.difference, signed=True) for effect in found]
        verdicts = [effect.verdict for effect in found if effect is not None]
        rows.append([*row, cell(*verdicts) if verdicts else Cell(number_format.NONE)])
    return Table(
        title=f"{study.endpoint} by arm",
        columns=columns,
        rows=rows,
        remarks=[
            "Tested by exchanging the runs of arm and control within each seed; failures with one"
            " control run per seed by Fisher's test. p is adjusted over the arms (Holm)."
        ],
    )


def arm_cell(arm: OutsideArm) -> Cell:
    """The arm's name, and whether it is the control."""
    return cell(arm.name, "control" if arm.is_control else "")


def _estimate(found: Any, *, signed: bool) -> Cell:
    if found is None:
        return Cell(number_format.NONE)
    shown = number_format.signed if signed else number_format.fixed
    ends = number_format.between(found.low, found.high) if found.low != found.high else ""
    return cell(shown(found.mean), ends)


def _chart(study: OutsideStudy) -> alt.Chart:
    rows = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "value": run.value,
            "outcome": "failed" if outside.has_failed(study, run) else "finite",
        }
        for run in study.runs
        if run.value is not None
    ]
    return (
        alt.Chart(pd.DataFrame(rows, columns=["arm", "seed", "value", "outcome"]))
        .mark_point(filled=True, opacity=0.8, size=60)
        .encode(
            x=alt.X("value:Q", title=study.endpoint, scale=alt.Scale(zero=False)),
            y=alt.Y("arm:N", sort=study.arms, title=None, axis=alt.Axis(grid=True, gridColor=GREY)),
            yOffset="seed:N",
            color=alt.Color(
                "outcome:N",
                title=None,
                scale=alt.Scale(domain=["finite", "failed"], range=[BLUE, VERMILLION]),
            ),
            tooltip=["arm:N", "seed:N", "value:Q"],
        )
        .properties(width=560, height=alt.Step(6), description=f"{study.endpoint} of every run")
    )


def _row(arm: OutsideArm) -> Mapping[str, Any]:
    row = {
        "arm": arm.name,
        "is_control": int(arm.is_control),
        "num_seeds": arm.num_seeds,
        "failing_runs": arm.failed.events,
        "runs": arm.failed.total,
        "mean": None if arm.mean is None else arm.mean.mean,
    }
    for endpoint, effect in arm.effects.items():
        row |= {
            f"{endpoint}_difference": effect.difference.mean,
            f"{endpoint}_difference_low": effect.difference.low,
            f"{endpoint}_difference_high": effect.difference.high,
            f"{endpoint}_p_value": effect.tested.p_value,
            f"{endpoint}_verdict": effect.verdict,
        }
    return row
