"""Branches: would a remedy have prevented a failure, had it begun at a saved state?

All repeats start from one saved state of one run. They differ only by the remedy and by a tiny
perturbation. The unit is the repeat, so the answer holds for that one failure only.
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
class Branch:
    """The repeats of one remedy from one state."""

    source: str
    """The run that saved the state, as <study>/<variant>/seed-<n>."""
    step: int
    label: str
    is_aa_control: bool
    finite: Proportion
    """Repeats without a non-finite step after the state."""
    control_finite: Proportion | None
    """The same for the A/A controls from this state; None if there are none."""

    @property
    def p_value(self) -> float | None:
        """P of Fisher's test against the A/A controls."""
        if self.is_aa_control or self.control_finite is None:
            return None
        return fisher(self.finite, self.control_finite)


def branches(study: Study) -> list[Branch]:
    """One for each remedy and state, A/A controls first; empty if no run is a branch."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    origins = set()
    for run in study.runs:
        origin = run.record.get("derived_from")
        # A run that shares its baseline's first steps is not a branch: its remedy starts later.
        if not origin or not has_ended(run) or run.acts_from != origin["step"]:
            continue
        groups.setdefault((origin["run"], origin["step"], run.variant), []).append(run)
        if f"@fork-{origin['step']}" in run.variant:
            origins.add((origin["run"], origin["step"]))
    # A remedy whose own start is the branch's step has the name of an ordinary run: include it.
    groups = {key: runs for key, runs in groups.items() if key[:2] in origins}
    is_control = {variant: runs[0].is_aa_control for (_, _, variant), runs in groups.items()}
    shorts = short_names(list(is_control))
    counted = {key: _count(runs, step=key[1]) for key, runs in groups.items()}
    lines = []
    for (source, step, variant), proportion in counted.items():
        controls = [
            other
            for (where, when, name), other in counted.items()
            if (where, when) == (source, step) and is_control[name]
        ]
        lines.append(
            Branch(
                source=source,
                step=step,
                label=shorts[variant],
                is_aa_control=is_control[variant],
                finite=proportion,
                control_finite=_sum(controls) if controls else None,
            )
        )
    return sorted(lines, key=lambda b: (b.source, b.step, not b.is_aa_control, b.label))


def _source_note(study: Study, line: Branch) -> str:
    """A note if the source run did not fail after the state; else empty."""
    record = read_json(study.folder.parent / line.source / "record.json")
    steps = [] if record is None else record["guard"]["nonfinite_steps"]
    if record is None or any(step > line.step for step in steps):
        return ""
    return "which did not fail after it: there was no failure to prevent"


def _count(runs: list[Run], *, step: int) -> Proportion:
    spared = [run for run in runs if not any(bad > step for bad in run.nonfinite_steps)]
    return Proportion(events=len(spared), total=len(runs))


def _sum(parts: list[Proportion]) -> Proportion:
    return Proportion(events=sum(p.events for p in parts), total=sum(p.total for p in parts))


def branches_table(study: Study, *, title: str) -> Table:
    """One row per branch: finite repeats with the remedy and in the A/A control."""
    rows = []
    for line in branches(study):
        against = NONE
        if line.control_finite is not None and not line.is_aa_control:
            against = f"{line.control_finite.events} of {line.control_finite.total}"
        p_value = line.p_value
        rows.append(
            [
                cell(line.label, "A/A control" if line.is_aa_control else ""),
                cell(f"step {line.step}", line.source, _source_note(study, line)),
                Cell(f"{line.finite.events} of {line.finite.total}"),
                Cell(against),
                Cell(NONE if p_value is None else f"{p_value:.3f}"),
            ]
        )
    return Table(
        title=title,
        columns=[
            Column(name="remedy", is_text=True),
            Column(name="from", is_text=True, may_wrap=True),
            Column(name="finite", note="repeats without a non-finite step after the state"),
            Column(name="A/A control finite", note="the same without a remedy, perturbed by 1e-7"),
            Column(name="p", note="Fisher's test of repeats from this one state, not adjusted"),
        ],
        rows=rows,
    )
