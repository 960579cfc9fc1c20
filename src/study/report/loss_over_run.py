"""The table of losses at each eleventh of the run, the form of the write-up's own table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from src.common import number_format
from src.common.record import frac_metric
from src.study.analysis.results import Analysis, ArmResult
from src.study.read.collect import Run, Study
from src.study.report.table import MARK, MARK_REMARK, Cell, Column, Table, cell, marked

NUM_PARTS = 11
LARGE_NORM = 100.0


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One validation of one run."""

    step: int
    loss: float | None
    """Mean over the finite windows; None if there were none."""
    nonfinite_frac: float


def validations(run: Run, loss_metric: str) -> list[Validation]:
    """All validations of a run, in order of steps."""
    frac = frac_metric(loss_metric)
    return [
        Validation(
            step=int(line["step"]), loss=line.get(loss_metric), nonfinite_frac=line.get(frac, 0.0)
        )
        for line in run.lines
        if loss_metric in line or frac in line
    ]


def nearest(found: Sequence[Validation], *, step: float, within: float) -> Validation | None:
    """The validation nearest to a step; None if none is within the given distance."""
    best = min(found, key=lambda validation: abs(validation.step - step), default=None)
    return best if best is not None and abs(best.step - step) <= within else None


def loss_over_run_table(study: Study, analysis: Analysis, *, title: str) -> Table:
    """One row per arm, one column per eleventh of the run."""
    columns = [Column(name="arm", is_text=True)]
    columns += [Column(name=f"{k}/{NUM_PARTS}") for k in range(1, NUM_PARTS + 1)]
    columns.append(
        Column(
            name="notes",
            note="the lowest mean loss; over all seeds, the first gradient norm above 100 and the"
            " first step with a non-finite loss or gradient",
            is_text=True,
            may_wrap=True,
        )
    )
    rows = [_row(arm, study.of(arm.variant)) for arm in analysis.arms]
    if all(each.text == number_format.NONE for row in rows for each in row[1:-1]):
        rows = []
    has_mark = any(MARK in each.plain for row in rows for each in row)
    return Table(
        title=title,
        columns=columns,
        rows=rows,
        is_grid=True,
        remarks=[
            "Mean over the seeds of the validation nearest to each eleventh of the run; below it"
            " the number of seeds, if some have none.",
            *([MARK_REMARK] if has_mark else []),
        ],
    )


def _row(arm: ArmResult, runs: Sequence[Run]) -> list[Cell]:
    # Until averaged weights exist, the curve is that of the weights themselves.
    curves = [validations(run, curve_metric(run, arm.loss_metric)) for run in runs]
    cells: list[Cell] = []
    means: dict[int, tuple[float, int]] = {}
    for k in range(1, NUM_PARTS + 1):
        found = []
        for run, curve in zip(runs, curves, strict=True):
            part = run.max_steps / NUM_PARTS
            validation = nearest(curve, step=round(k * part), within=part / 2)
            if validation is not None:
                found.append(validation)
        losses = [v.loss for v in found if v.loss is not None]
        is_marked = any(v.nonfinite_frac > 0 for v in found)
        if losses and not is_marked:
            means[k] = fmean(losses), found[0].step
        aside = f"{len(losses)} of {len(runs)}" if found and len(losses) < len(runs) else ""
        text = number_format.fixed(fmean(losses) if losses else None)
        cells.append(cell(marked(text, nonfinite=is_marked), aside))
    return [Cell(arm.label), *cells, Cell("; ".join(_notes(runs, means)))]


def curve_metric(run: Run, loss_metric: str) -> str:
    """The arm's metric; if averaged weights were never evaluated, that of the plain weights."""
    return loss_metric if any(loss_metric in line for line in run.lines) else "val/loss"


def _notes(runs: Sequence[Run], means: dict[int, tuple[float, int]]) -> list[str]:
    notes = []
    if means:
        best, at = min(means.values())
        notes.append(f"best {number_format.fixed(best)} at step {at:,}")
    over = [(step, run) for run in runs if (step := first_large_norm(run)) is not None]
    if over:
        step, run = min(over, key=lambda pair: pair[0])
        notes.append(f"norm above 100 by step {step:,} (seed {run.seed})")
    failed = [(run.nonfinite_steps[0], run) for run in runs if run.nonfinite_steps]
    if failed:
        step, run = min(failed, key=lambda pair: pair[0])
        notes.append(f"first NaN at step {step:,} (seed {run.seed})")
    return notes


def first_large_norm(run: Run) -> int | None:
    """The first logged step by which a gradient norm had exceeded 100; None if none did."""
    for line in run.lines:
        counted = line.get("spike/norm_over_100", 0.0) > 0
        if counted or line.get("grad/norm", 0.0) > LARGE_NORM:
            logged = int(line["step"])
            # The step of the largest norm is known: it is the first if there was only one.
            spikes = run.record.get("spikes", {})
            alone = spikes.get("norm_over_100") == 1
            return int(spikes["grad_norm_max_step"]) if alone else logged
    return None
