"""Counterfactuals: would an option have averted a failure, had it begun at a saved state?

All repeats start from one state of one run, and differ by chance alone and by the option. Here the
repeats are the unit: the answer is about that one failure, and not about others.
"""

from dataclasses import dataclass

from src.common.number_format import NONE
from src.common.run_folder import read_json
from src.config.variant_name import short_names
from src.study.analysis.endpoints import has_ended
from src.study.analysis.results import Proportion
from src.study.analysis.stats import fisher
from src.study.read.collect import Run, Study
from src.study.report.table import Cell, Column, Table, cell


@dataclass(frozen=True, kw_only=True)
class Averted:
    """Repeats of one option from one state."""

    source: str
    """The run whose state it is, as <study>/<variant>/seed-<n>."""
    step: int
    label: str
    is_null: bool
    """Shaken, and nothing else."""
    averted: Proportion
    """Repeats without a non-finite step after the state."""
    null: Proportion | None
    """The same of the null repeats from the same state; None where there are none."""

    @property
    def p_value(self) -> float | None:
        """Fisher's, against the null repeats."""
        if self.is_null or self.null is None:
            return None
        return fisher(self.averted, self.null)


def averted(study: Study) -> list[Averted]:
    """A line for each option and state, null repeats first; empty where nothing was forked."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    origins = set()
    for run in study.runs:
        origin = run.record.get("derived_from")
        # A shared beginning is no counterfactual: the option would not have acted before.
        if not origin or not has_ended(run) or run.acts_from != origin["step"]:
            continue
        groups.setdefault((origin["run"], origin["step"], run.variant), []).append(run)
        if f"@fork-{origin['step']}" in run.variant:
            origins.add((origin["run"], origin["step"]))
    # An option whose own start is the fork's step is another run from nothing in name only.
    groups = {key: runs for key, runs in groups.items() if key[:2] in origins}
    is_control = {variant: runs[0].is_aa_control for (_, _, variant), runs in groups.items()}
    shorts = short_names(list(is_control))
    counted = {key: _count(runs, step=key[1]) for key, runs in groups.items()}
    lines = []
    for (source, step, variant), proportion in counted.items():
        nulls = [
            other
            for (where, when, name), other in counted.items()
            if (where, when) == (source, step) and is_control[name]
        ]
        lines.append(
            Averted(
                source=source,
                step=step,
                label=shorts[variant],
                is_null=is_control[variant],
                averted=proportion,
                null=_sum(nulls) if nulls else None,
            )
        )
    return sorted(lines, key=lambda a: (a.source, a.step, not a.is_null, a.label))


def _unfailing(study: Study, line: Averted) -> str:
    """What a reader must know of a source in which nothing failed; empty where something did."""
    record = read_json(study.folder.parent / line.source / "record.json")
    steps = [] if record is None else record["guard"]["nonfinite_steps"]
    if record is None or any(step > line.step for step in steps):
        return ""
    return "which did not fail after it: there was nothing to avert"


def _count(runs: list[Run], *, step: int) -> Proportion:
    spared = [run for run in runs if not any(bad > step for bad in run.nonfinite_steps)]
    return Proportion(events=len(spared), total=len(runs))


def _sum(parts: list[Proportion]) -> Proportion:
    return Proportion(events=sum(p.events for p in parts), total=sum(p.total for p in parts))


def averted_table(study: Study, *, title: str) -> Table:
    """Averted k of R, against the null's k of R."""
    rows = []
    for line in averted(study):
        against = NONE
        if line.null is not None and not line.is_null:
            against = f"{line.null.events} of {line.null.total}"
        p_value = line.p_value
        rows.append(
            [
                cell(line.label, "null: shaken alone" if line.is_null else ""),
                cell(f"step {line.step}", line.source, _unfailing(study, line)),
                Cell(f"{line.averted.events} of {line.averted.total}"),
                Cell(against),
                Cell(NONE if p_value is None else f"{p_value:.3f}"),
            ]
        )
    return Table(
        title=title,
        columns=[
            Column(name="option", is_text=True),
            Column(name="from", is_text=True, may_wrap=True),
            Column(name="averted", note="repeats without a non-finite step after the state"),
            Column(name="null averted", note="the same, of repeats shaken by 1e-7 alone"),
            Column(name="p", note="Fisher's, of repeats from this one state, not adjusted"),
        ],
        rows=rows,
    )
