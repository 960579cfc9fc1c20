"""The first table of a report: the outcomes, with one row per arm."""

import pandas as pd

from src.common import number_format
from src.study.analysis.frames import OUTCOMES
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
    mean_cell,
)

SHORT = (
    "arm",
    "outcomes",
    "non-finite runs",
    "non-finite batches",
    "first one",
    "val/loss",
    "difference",
)
"""The columns that fit into a terminal."""

ARM_COLUMNS = (
    Column(
        name="arm",
        note="the remedies, or whatever distinguishes the arm; below it, its role and when it acts",
        is_text=True,
    ),
    Column(name="seeds", note="a seed has the same initial weights and data order in every arm"),
    Column(
        name="outcomes",
        note="of the runs: clean; intermittent (batches were skipped, the run recovered); collapsed"
        " (over half of the last seventh was skipped, or nothing finite was left); stopped by the"
        " guard",
        is_text=True,
        may_wrap=True,
    ),
    Column(
        name="non-finite runs",
        note="runs with a non-finite batch after the arm begins to act; below it, the untreated"
        " ones (of baseline and A/A control) of the same seeds from the same step on",
    ),
    Column(name="non-finite batches", note="per run after that step: mean and 95 % interval"),
    Column(name="first one", note="the first non-finite step of every seed that has one"),
    Column(
        name="val/loss",
        note="final validation loss of the clean seeds in nats per token: mean and 95 % interval;"
        " the loss of damaged runs is listed separately",
    ),
    Column(
        name="difference",
        note="loss minus that of untreated runs of the same seeds, with its 95 % interval; below"
        " it, the range of single seeds of the A/A control",
    ),
    Column(name="spikes", note="mean number per run, by any of the definitions"),
    Column(
        name="cost",
        note="seconds per run, shared steps included; below it, tokens and training FLOPs of the"
        " active parameters",
    ),
)


def arms_table(frame: pd.DataFrame, *, title: str) -> Table:
    """The outcomes, with one row per arm."""
    lines = [
        [
            arm_cell(row),
            _seeds(row),
            _outcomes(row),
            _nonfinite(row),
            mean_cell(row, "nonfinite_batches", decimals=1),
            Cell(number_format.steps([int(s) for s in str(row["first_nonfinite"] or "").split()])),
            _loss(row),
            _difference(row, "loss"),
            mean_cell(row, "spikes", decimals=1),
            _cost(row),
        ]
        for row in frame.to_dict("records")
    ]
    return Table(
        title=title,
        columns=ARM_COLUMNS,
        rows=lines,
        remarks=mark_remark(lines),
    )


def _seeds(row: Row) -> Cell:
    seeds, runs = (row[key] or 0 for key in ("num_seeds", "num_runs"))
    return cell(f"{seeds:.0f}", f"{runs:.0f} runs" if runs != seeds else "")


def _outcomes(row: Row) -> Cell:
    counts = {name: int(row[f"runs_{name}"] or 0) for name in OUTCOMES}
    shown = [f"{count}\N{NO-BREAK SPACE}{name}" for name, count in counts.items() if count]
    return Cell(", ".join(shown) or number_format.NONE)


def _nonfinite(row: Row) -> Cell:
    def share(prefix: str) -> str:
        events, total = row[f"{prefix}_runs"], row[f"{prefix}_total"]
        return "" if events is None or total is None else f"{events:.0f} of {total:.0f}"

    untreated, before = share("untreated_nonfinite"), row["num_failed_before"]
    return cell(
        share("nonfinite") or number_format.NONE,
        f"untreated {untreated}" if untreated else "",
        f"{before:.0f} seed{'s' if before > 1 else ''} failed before" if before else "",
    )


def _loss(row: Row) -> Cell:
    mean = mean_cell(row, "loss", decimals=3)
    asides = list(mean.asides)
    seeds, damaged = row["loss_num_seeds"], row["damaged_runs"]
    if seeds is not None and seeds != row["num_seeds"]:
        asides.append(f"{seeds:.0f} comparable")
    if damaged:
        is_marked = bool(row["marked_runs"])
        others = marked(number_format.fixed(row["damaged_loss"]), nonfinite=is_marked)
        asides.append(f"{damaged:.0f} damaged: {others}")
    return cell(mean.text, *asides)


def _difference(row: Row, endpoint: str) -> Cell:
    found, control = difference_cell(row, endpoint), aa_range(row, endpoint)
    return cell(found.text, *found.asides, f"A/A control {control}" if control else "")


def _cost(row: Row) -> Cell:
    seconds = row["seconds"]
    text = number_format.NONE if seconds is None else f"{number_format.fixed(seconds, 1)} s"
    tokens = number_format.compact(row["tokens"])
    flops = number_format.compact(row["active_flops"], "FLOP")
    return cell(text, f"{tokens} tokens", flops if flops != number_format.NONE else "")
