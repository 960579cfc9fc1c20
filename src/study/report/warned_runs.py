"""The table of early warnings: which runs warned before a non-finite step, and how early."""

from src.common.number_format import NONE
from src.study.analysis.results import Analysis
from src.study.read.collect import Run, Study
from src.study.report.table import Cell, Column, Table, cell

COLUMNS = (
    Column(name="arm", is_text=True),
    Column(name="seed"),
    Column(name="warning at step"),
    Column(name="next non-finite step"),
    Column(name="lead", note="steps between the two; below it, the share of the run"),
    Column(name="warning", is_text=True, may_wrap=True),
)


def alarms_table(study: Study, analysis: Analysis, *, title: str) -> Table:
    """One row per run that warned or failed; no rows if no run warned."""
    labels = {arm.variant: arm.label for arm in analysis.arms}
    runs = [run for variant in labels for run in study.of(variant)]
    rows = [_row(labels[run.variant], run) for run in runs if run.alarms or run.nonfinite_steps]
    # If no run warned, the incidents' table shows the failures.
    any_alarm = any(run.alarms for run in runs)
    return Table(title=title, columns=COLUMNS, rows=rows if any_alarm else [])


def _row(label: str, run: Run) -> list[Cell]:
    alarm = run.alarms[0] if run.alarms else None
    # A warning is for the failures that follow it.
    since = 0 if alarm is None else alarm["step"]
    failed = next((step for step in run.nonfinite_steps if step >= since), None)
    earlier = run.nonfinite_steps[0] if run.nonfinite_steps else None
    lead = Cell(NONE)
    if alarm is not None and failed is not None:
        steps = failed - since
        lead = cell(str(steps), f"{steps / run.max_steps:.0%} of the run")
    never = "never" if earlier is None else "none after it"
    warning = "no warning" if alarm is None else str(alarm["line"])
    return [
        Cell(label),
        cell(str(run.seed), f"repeat {run.repeat}" if run.repeat else ""),
        Cell(NONE if alarm is None else str(alarm["step"])),
        cell(
            never if failed is None else str(failed),
            "" if earlier == failed or earlier is None else f"first at step {earlier}",
        ),
        lead,
        Cell(warning.partition(": ")[2] or warning),
    ]
