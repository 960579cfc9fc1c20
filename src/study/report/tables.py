"""The other tables that are made of rows: comparisons, equal cost, every run."""

from collections.abc import Sequence

import pandas as pd

from src.common import number_format
from src.study.analysis.endpoints import AXES
from src.study.analysis.frames import ENDPOINTS
from src.study.report.table import (
    Cell,
    Column,
    Row,
    Table,
    arm_cell,
    cell,
    difference_cell,
    mark_remark,
    marked,
    null_range,
)

COMPARISON_COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="endpoint", note="taken after the step from which the arm acts", is_text=True),
    Column(name="seeds", note="pairs of an arm's seed with the baseline's"),
    Column(name="difference", note="arm minus baseline: mean and 95 % interval"),
    Column(
        name="null arm",
        note="least and greatest difference that chance alone has made, on single seeds; of the"
        " share, over all seeds",
    ),
    Column(name="p", note="adjusted for all arms of the study"),
    Column(name="smallest p", note="the least that so many seeds can reach, whatever they show"),
    Column(
        name="smallest effect",
        note="the smallest difference that this design would find 8 times of 10; none where its"
        " smallest p is above 0.05 already, or where there is nothing to measure it by",
    ),
    Column(name="what it says", is_text=True, may_wrap=True),
)


PRIMARY, SECONDARY = ("nonfinite", "loss"), ("nonfinite_batches", "first_nonfinite", "spikes")
"""Endpoints that are shown at once, and those that are folded away."""


def comparisons_table(frame: pd.DataFrame, *, endpoints: Sequence[str], title: str) -> Table:
    """Every arm against its baseline."""
    lines = [
        [
            arm_cell(row),
            Cell(ENDPOINTS[endpoint][0]),
            Cell(number_format.fixed(row[f"{endpoint}_difference_num_seeds"], 0)),
            difference_cell(row, endpoint),
            Cell(null_range(row, endpoint) or number_format.NONE),
            Cell(number_format.p_value(row[f"{endpoint}_p_value"])),
            Cell(number_format.p_value(row[f"{endpoint}_smallest_p"])),
            _smallest_effect(row, endpoint),
            Cell(str(row[f"{endpoint}_verdict"])),
        ]
        for row in frame.to_dict("records")
        for endpoint in endpoints
        if row[f"{endpoint}_verdict"]
    ]
    return Table(title=title, columns=COMPARISON_COLUMNS, rows=lines)


def _smallest_effect(row: Row, endpoint: str) -> Cell:
    effect = row[f"{endpoint}_smallest_effect"]
    return Cell("none" if effect is None else number_format.fixed(effect, ENDPOINTS[endpoint][1]))


def equal_cost_table(frame: pd.DataFrame, *, title: str) -> Table:
    """The loss where every arm has cost the same."""
    names = {
        "steps": "equal steps",
        "tokens": "equal tokens",
        "active_flops": "equal FLOPs",
        "seconds": "equal seconds",
    }
    axes = [
        axis
        for axis in AXES
        if any(row[f"loss_at_equal_{axis}"] is not None for row in frame.to_dict("records"))
    ]
    lines = []
    for row in frame.to_dict("records") if axes else ():
        cells = [arm_cell(row)]
        for axis in axes:
            difference = row[f"loss_difference_at_equal_{axis}"]
            aside = (
                "" if difference is None else f"{number_format.signed(difference)} to the baseline"
            )
            cells.append(cell(number_format.fixed(row[f"loss_at_equal_{axis}"]), aside))
        lines.append(cells)
    return Table(
        title=title,
        columns=[Column(name="arm", is_text=True), *(Column(name=names[axis]) for axis in axes)],
        rows=lines,
        remarks=[
            "Mean validation loss of clean seeds, read off their curves where each has cost what"
            " the cheapest clean run of the study cost in all. Arms that take more seconds or FLOPs"
            " a step are compared fairly here alone; one that ends early reaches no such cost, and"
            " is compared at its own end above."
        ],
    )


RUN_COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="seed"),
    Column(name="outcome", is_text=True),
    Column(name="steps", note="of the run; beneath it those of its own, where it shared others'"),
    Column(name="non-finite", note="batches of the whole run; beneath it the first"),
    Column(name="spikes"),
    Column(name="greatest norm", note="of the gradient, and its step"),
    Column(name="val/loss", note="at the end"),
    Column(name="best", note="validation loss, and its step"),
    Column(name="seconds"),
    Column(name="incident", note="what failed first", is_text=True),
)


def runs_table(frame: pd.DataFrame, *, title: str) -> Table:
    """A run a row."""
    lines = []
    for row in frame.to_dict("records"):
        lines.append(
            [
                Cell(str(row["label"])),
                cell(_whole(row, "seed"), f"repeat {row['repeat']}" if row["repeat"] else ""),
                Cell(str(row["outcome"])),
                cell(
                    _whole(row, "steps"),
                    "" if row["own_steps"] == row["steps"] else f"{_whole(row, 'own_steps')} own",
                ),
                cell(_whole(row, "nonfinite_batches"), _at(row, "first_nonfinite")),
                Cell(_whole(row, "spikes")),
                cell(
                    number_format.fixed(row["grad_norm_max"], 1),
                    _at(row, "grad_norm_max_step"),
                ),
                _marked_loss(row, "loss", "nonfinite_frac", ""),
                _marked_loss(row, "best_loss", "best_nonfinite_frac", _at(row, "best_step")),
                Cell(number_format.fixed(row["seconds"], 1)),
                cell(
                    str(row["incident_cause"] or number_format.NONE),
                    str(row["incident_module"] or ""),
                ),
            ]
        )
    return Table(
        title=title,
        columns=RUN_COLUMNS,
        rows=lines,
        remarks=mark_remark(lines),
    )


def _whole(row: Row, key: str) -> str:
    return number_format.fixed(row[key], 0)


def _at(row: Row, key: str) -> str:
    step = row[key]
    return "" if step is None else f"step {step:,.0f}"


def _marked_loss(row: Row, loss: str, frac: str, aside: str) -> Cell:
    share = row[frac] or 0.0
    text = marked(number_format.fixed(row[loss]), nonfinite=share > 0)
    return cell(text, aside, f"{share:.0%} non-finite" if share > 0 else "")
