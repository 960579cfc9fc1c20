"""The tables of comparisons, of losses at equal cost, and of all runs."""

from collections.abc import Mapping, Sequence

import pandas as pd

from src.common import number_format
from src.study.analysis.endpoints import AXES
from src.study.analysis.frames import ENDPOINTS
from src.study.report.table import (
    Cell,
    Column,
    Row,
    Table,
    aa_range,
    arm_cell,
    cell,
    difference_cell,
    mark_remark,
    marked,
)

COMPARISON_COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="endpoint", note="measured after the arm begins to act", is_text=True),
    Column(name="seeds", note="seeds that both arm and baseline have"),
    Column(
        name="difference",
        note="arm minus untreated runs (of baseline and A/A control): mean and 95 % interval",
    ),
    Column(
        name="A/A control",
        note="smallest and largest difference of single seeds of the A/A control (for the share:"
        " over all seeds)",
    ),
    Column(name="p", note="adjusted over all arms of the study"),
    Column(name="smallest p", note="the smallest p that these runs could have given"),
    Column(
        name="detectable effect",
        note="detected with 80 % power beside the other arms' results: for the share, the part of"
        " the failures that a remedy must prevent; otherwise the mean difference; none if no effect"
        " would be detected or the seeds do not vary",
    ),
    Column(name="verdict", is_text=True, may_wrap=True),
)


PRIMARY = ("nonfinite", "loss")
SECONDARY = ("nonfinite_batches", "first_nonfinite", "nonfinite_tokens", "spikes")
"""Endpoints that are always shown, and those that are folded."""


def comparisons_table(frame: pd.DataFrame, *, endpoints: Sequence[str], title: str) -> Table:
    """One row per arm and endpoint."""
    lines = [
        [
            arm_cell(row),
            Cell(ENDPOINTS[endpoint][0]),
            Cell(number_format.fixed(row[f"{endpoint}_difference_num_seeds"], 0)),
            difference_cell(row, endpoint),
            Cell(aa_range(row, endpoint) or number_format.NONE),
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
    """The losses at which all arms have cost the same."""
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
            aside = "" if difference is None else f"{number_format.signed(difference)} vs baseline"
            cells.append(cell(number_format.fixed(row[f"loss_at_equal_{axis}"]), aside))
        lines.append(cells)
    return Table(
        title=title,
        columns=[Column(name="arm", is_text=True), *(Column(name=names[axis]) for axis in axes)],
        rows=lines,
        is_grid=True,
        remarks=[
            "Mean validation loss of the clean seeds, interpolated where each has cost as much as"
            " the cheapest clean run of the study in total. This is the fair comparison of arms"
            " whose steps take more seconds or FLOPs. An arm that ends early does not reach that"
            " cost; the comparison above takes its loss at its own end."
        ],
    )


RUN_COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="seed"),
    Column(name="outcome", is_text=True),
    Column(name="steps", note="below it, the steps of its own if it shares some with another run"),
    Column(name="non-finite", note="batches of the whole run; below it, the first one"),
    Column(name="spikes"),
    Column(name="max grad norm", note="and its step"),
    Column(name="val/loss", note="at the end"),
    Column(name="best", note="lowest validation loss, and its step"),
    Column(name="seconds"),
    Column(name="incident", note="what failed first", is_text=True),
)


def runs_table(
    frame: pd.DataFrame, *, title: str, links: Mapping[tuple[str, int, int], str]
) -> Table:
    """One row per run; its seed links to its folder, by variant, seed and repeat."""
    lines = []
    for row in frame.to_dict("records"):
        lines.append(
            [
                Cell(str(row["label"])),
                cell(
                    _whole(row, "seed"),
                    f"repeat {row['repeat']}" if row["repeat"] else "",
                    link=links.get((row["variant"], row["seed"], row["repeat"]), ""),
                ),
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
