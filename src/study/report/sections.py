"""The sections of a report, in their order: every form of a report is made from this one list."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from src.study.analysis import rates
from src.study.analysis.expert_loads import all_loads
from src.study.analysis.frames import arms_frame, runs_frame
from src.study.analysis.results import Analysis
from src.study.read.collect import Study
from src.study.report import chart_data, charts, provenance
from src.study.report.counterfactuals import averted_table
from src.study.report.load_table import load_table
from src.study.report.loss_over_run import elevenths_table
from src.study.report.sample_texts import samples_table
from src.study.report.saved_models import starts_table
from src.study.report.summary import arms_table
from src.study.report.table import Table, setting
from src.study.report.tables import (
    PRIMARY,
    SECONDARY,
    comparisons_table,
    equal_cost_table,
    runs_table,
)
from src.study.report.warned_runs import alarms_table


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What sections are made from."""

    study: Study
    analysis: Analysis
    folder: Path
    """Where the report lies, from which its links lead."""

    @cached_property
    def facts(self) -> chart_data.RunFacts:
        """What charts say of a run under the mouse."""
        return chart_data.RunFacts(self.analysis, self.folder)

    @cached_property
    def families(self) -> list[rates.Family]:
        """Arms that differ in the learning rate alone."""
        return rates.families(self.study)

    @cached_property
    def arms(self) -> pd.DataFrame:
        """A row an arm."""
        return arms_frame(self.study, self.analysis)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row a run."""
        return runs_frame(self.study, self.analysis)

    @cached_property
    def setting(self) -> str:
        """Router and preset, which the title of every table names."""
        return setting(self.study)


@dataclass(frozen=True)
class TableOf:
    """One table of a section."""

    title: str
    """To which router and preset are added."""
    make: Callable[[Findings, str], Table]
    """Of what is found, and the whole title."""
    folded: str = ""
    """What stands for the table until a click opens it; empty where it is open."""
    folds_after: int = 0
    """Rows up to which it is open all the same."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report; it is left out where it has neither a chart nor a row."""

    name: str
    """Of its place in the page."""
    heading: str
    remark: str = ""
    """What is asked here, and what words mean; code stands between backticks."""
    finding: Callable[[Findings], str] = lambda _: ""
    """A sentence of this study's results."""
    charts: Mapping[str, Callable[[Findings], Any]] = field(default_factory=dict)
    """By name of the file, functions that give a chart, or None where there is nothing to draw."""
    reading: str = ""
    """How its charts are read."""
    tables: Sequence[TableOf] = ()


def _failures(found: Findings) -> Any:
    arms = found.analysis.arms
    return charts.failures(
        chart_data.failures(found.study, found.analysis, found.facts),
        chart_data.strip_rows(arms, [arm.nonfinite_batches for arm in arms]),
        [f"{arm.nonfinite.events} of {arm.nonfinite.total}" for arm in arms],
    )


def _final_losses(found: Findings) -> Any:
    arms = found.analysis.arms
    points = chart_data.final_losses(found.study, found.analysis, found.facts)
    if points.empty:
        return None
    return charts.final_losses(
        points,
        chart_data.strip_rows(arms, [arm.loss for arm in arms]),
        ["none clean" if arm.loss is None else f"{arm.loss.mean:.3f}" for arm in arms],
    )


def _learning_rates(found: Findings) -> Any:
    if not found.families:
        return None
    return charts.learning_rates(chart_data.learning_rates(found.families, found.facts))


def _loss_curves(found: Findings) -> Any:
    curves = chart_data.loss_curves(found.study, found.analysis, found.facts)
    return None if curves.empty else charts.loss_curves(curves)


def _timeline(found: Findings) -> Any:
    spans = chart_data.timeline(
        found.study, found.analysis, found.facts, width=charts.TIMELINE_WIDTH
    )
    return charts.timeline(spans)


def _router_loads(found: Findings) -> Any:
    loads = all_loads(found.study, found.analysis)
    return charts.router_loads(chart_data.router_loads(loads)) if loads else None


def _comparisons(endpoints: Sequence[str]) -> Callable[[Findings, str], Table]:
    return lambda f, title: comparisons_table(f.arms, endpoints=endpoints, title=title)


def _causes(found: Findings) -> str:
    causes = provenance.causes(found.study)
    return f"Causes: {'; '.join(causes)} runs with an incident." if causes else ""


SECTIONS = (
    Section(
        name="arms",
        heading="What happened",
        charts={"failures": _failures, "final-loss": _final_losses},
        reading="A point is a run, and a seed keeps its height within every row. Batches are"
        " counted after the step from which the arm acts, on a logarithmic axis; a short grey"
        " stroke at a point's height is the baseline with the same seed, counted from the same"
        " step. The bar beneath the points: mean and 95 % interval, of losses over clean seeds"
        " alone. Pale: failed before the arm could act.",
        tables=[TableOf("What happened, by arm", lambda f, title: arms_table(f.arms, title=title))],
    ),
    Section(
        name="starts",
        heading="Saved models",
        tables=[
            TableOf(
                "Saved models before and after training",
                lambda f, title: starts_table(f.study, f.analysis, title=title),
            )
        ],
    ),
    Section(
        name="rates",
        heading="Learning rates",
        charts={"learning-rate": _learning_rates},
        reading="A point is a run, marked by its outcome; the line is the mean. A run that"
        " collapsed or was stopped, or whose validation had windows without a finite loss, stands"
        " at the loss of a uniform guess.",
        tables=[
            TableOf(
                "Learning rates", lambda f, title: rates.sensitivity_table(f.families, title=title)
            )
        ],
    ),
    Section(
        name="averted",
        heading="Counterfactuals",
        remark="Repeats that start from one saved state of one run. They answer for that failure"
        " alone: had the option begun there, would it have been averted, and how often does chance"
        " alone avert it?",
        tables=[
            TableOf(
                "Would it have been averted?", lambda f, title: averted_table(f.study, title=title)
            )
        ],
    ),
    Section(
        name="comparisons",
        heading="Against the baseline",
        remark="What each arm changes, beside what chance alone changes, and what a study of this"
        " size could have found at all.",
        tables=[
            TableOf("Failures and loss against the baseline", _comparisons(PRIMARY)),
            TableOf(
                "Other endpoints against the baseline",
                _comparisons(SECONDARY),
                "Batches, first steps and spikes too",
            ),
        ],
    ),
    Section(
        name="cost",
        heading="Loss at equal cost",
        tables=[
            TableOf("Loss at equal cost", lambda f, title: equal_cost_table(f.arms, title=title))
        ],
    ),
    Section(
        name="loss",
        heading="Loss over the run",
        charts={"loss": _loss_curves},
        reading="A thin line is a seed. Thick line and band: mean and span of the clean seeds. A"
        " cross marks a validation with non-finite windows; a line breaks where no window was"
        " finite. Dotted: the step from which the arm acts. What blows up beyond the others is"
        " drawn on the upper edge.",
        tables=[
            TableOf(
                "Validation loss at each eleventh of the run",
                lambda f, title: elevenths_table(f.study, f.analysis, title=title),
            )
        ],
    ),
    Section(
        name="timeline",
        heading="Spikes and non-finite steps",
        charts={"timeline": _timeline},
        reading="A line is a run. Full bars: steps whose loss or gradient was not finite. Small"
        " triangles above the line: spikes that were finite. A dark stroke ends the run.",
    ),
    Section(
        name="load",
        heading="Load of the experts",
        remark="The mean load is top_k / E whatever the router does, even a collapsed one, because"
        " every token takes top_k experts: it is an identity and no sign of health. MaxVio is the"
        " figure: by how much the busiest expert exceeds the mean, as a share of the mean.",
        charts={"load": _router_loads},
        reading="Bars: from the least to the most used expert of each layer, as shares of tokens,"
        " over the last quarter of the run and all seeds. Stroke: the mean.",
        tables=[
            TableOf(
                "Load of the experts, by layer",
                lambda f, title: load_table(all_loads(f.study, f.analysis), f.study, title=title),
                "Every layer as figures",
            )
        ],
    ),
    Section(
        name="alarms",
        heading="Early warnings",
        remark="A figure that was on its way to a limit of its arithmetic, said before a step was"
        " not finite: once a run and kind of figure, the first of them here."
        " `guard.on_alarm=checkpoint` keeps the state there, for forks.",
        tables=[
            TableOf(
                "Early warnings, by run",
                lambda f, title: alarms_table(f.study, f.analysis, title=title),
                "Every run",
                24,
            )
        ],
    ),
    Section(
        name="incidents",
        heading="Incidents",
        finding=_causes,
        remark="Named is the first module whose result was not finite. A step number leads to the"
        " page on it; `python -m src.replay incident=FOLDER` runs that step again.",
        tables=[
            TableOf(
                "What failed first, by run",
                lambda f, title: provenance.incidents_table(
                    f.study, f.analysis, title=title, folder=f.folder
                ),
                "Every run",
                24,
            )
        ],
    ),
    Section(
        name="config",
        heading="Configuration",
        remark="Fields in which an arm differs from its baseline; all else is equal.",
        tables=[
            TableOf(
                "Differences in configuration",
                lambda f, title: provenance.config_table(f.study, f.analysis, title=title),
            )
        ],
    ),
    Section(
        name="samples",
        heading="Samples",
        tables=[
            TableOf(
                "What the models write",
                lambda f, title: samples_table(f.study, f.analysis, title=title, folder=f.folder),
            )
        ],
    ),
    Section(
        name="runs",
        heading="Every run",
        tables=[
            TableOf("Every run", lambda f, title: runs_table(f.runs, title=title), "Every run", 24)
        ],
    ),
)

CHARTS = {name: make for section in SECTIONS for name, make in section.charts.items()}
"""All charts of studies, by name."""
