"""The validation loss of saved models before and after further training."""

from collections.abc import Sequence
from statistics import fmean

from src.common import number_format
from src.study.analysis.endpoints import by_seed, clean_loss
from src.study.analysis.results import Analysis
from src.study.read.collect import Run, Study
from src.study.report.table import Cell, Column, Table, cell

COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="starts from", is_text=True),
    Column(name="parameters"),
    Column(name="KV cache", note="bytes per token in decoding, in float32"),
    Column(name="val/loss before", note="with the initial weights, mean over the seeds"),
    Column(
        name="val/loss after",
        note="at the end, mean over the clean seeds; below it the mean change of those seeds",
    ),
)


def saved_models_table(study: Study, analysis: Analysis, *, title: str) -> Table:
    """One row per arm; no rows if no arm starts from a saved model."""
    rows = []
    if any(run.record.get("init") for run in study.runs):
        for arm in analysis.arms:
            runs = [run for each in by_seed(study.of(arm.variant)).values() for run in each]
            if runs:
                rows.append(_row(arm.label, runs))
    return Table(title=title, columns=COLUMNS, rows=rows)


def _row(label: str, runs: Sequence[Run]) -> list[Cell]:
    record = runs[0].record
    ends = [(run.initial_loss, clean_loss(run, step=run.steps)) for run in runs]
    before = [first for first, _ in ends if first is not None]
    after = [last for _, last in ends if last is not None]
    gains = [last - first for first, last in ends if first is not None and last is not None]
    gained = f"change {number_format.signed(fmean(gains))}" if gains else ""
    return [
        Cell(label),
        Cell(str((record.get("init") or {}).get("path", "random weights"))),
        Cell(number_format.fixed(record.get("params_total"), 0)),
        Cell(number_format.fixed(record.get("cache_bytes_per_token"), 0)),
        Cell(number_format.fixed(fmean(before) if before else None)),
        cell(number_format.fixed(fmean(after) if after else None), gained),
    ]
