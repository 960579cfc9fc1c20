"""The sections of a report, in order. Every form of a report is made from this list."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from src.study.analysis import rates
from src.study.analysis.answer_without_failures import nothing_fails
from src.study.analysis.expert_loads import all_loads
from src.study.analysis.frames import arms_frame, runs_frame
from src.study.analysis.results import Analysis
from src.study.read.collect import Study
from src.study.report import chart_data, charts, provenance
from src.study.report.arms_table import arms_table
from src.study.report.branches import branches_table
from src.study.report.load_table import load_table
from src.study.report.loss_over_run import loss_over_run_table
from src.study.report.sample_texts import samples_table
from src.study.report.saved_models import saved_models_table
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
    """The data from which sections are made."""

    study: Study
    analysis: Analysis
    folder: Path
    """The report's folder, to which links are relative."""

    @cached_property
    def facts(self) -> chart_data.RunFacts:
        """The facts about runs that charts show in tooltips."""
        return chart_data.RunFacts(self.analysis, self.folder)

    @cached_property
    def families(self) -> list[rates.Family]:
        """Groups of arms that differ only in the learning rate."""
        return rates.families(self.study)

    @cached_property
    def arms(self) -> pd.DataFrame:
        """The frame of arms."""
        return arms_frame(self.study, self.analysis)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The frame of runs."""
        return runs_frame(self.study, self.analysis)

    @cached_property
    def links(self) -> dict[tuple[str, int, int], str]:
        """Links to the folders of the runs that have one, by variant, seed and repeat."""
        links = {
            (run.variant, run.seed, run.repeat): self.facts(run)["link"] for run in self.study.runs
        }
        return {key: link for key, link in links.items() if link is not None}

    @cached_property
    def setting(self) -> str:
        """Router and preset, for the titles of tables."""
        return setting(self.study)


@dataclass(frozen=True)
class TableOf:
    """One table of a section."""

    title: str
    """Without router and preset, which are appended."""
    make: Callable[[Findings, str], Table]
    """Makes the table from the findings and the whole title."""
    folded: str = ""
    """The text that is shown until a click opens the table; if empty, the table is always open."""
    folds_after: int = 0
    """A table with at most this many rows is open anyway."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a report. It is left out if it has neither a chart nor a row."""

    name: str
    """The anchor in the page."""
    heading: str
    remark: str = ""
    """The question and the terms of the section; code stands between backticks."""
    finding: Callable[[Findings], str] = lambda _: ""
    """A sentence about this study's results."""
    charts: Mapping[str, Callable[[Findings], Any]] = field(default_factory=dict)
    """By file name, functions that give a chart, or None if there is nothing to draw."""
    reading: Callable[[Findings], str] = lambda _: ""
    """How to read the charts."""
    reading_of: Mapping[str, str] = field(default_factory=dict)
    """How to read one of the charts, by name."""
    tables: Sequence[TableOf] = ()


def _failures(found: Findings) -> Any:
    arms = found.analysis.arms
    if nothing_fails(arms):
        return None
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
        end_title="clean mean" if any(arm.num_runs > 1 for arm in arms) else "loss",
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


def _reading_of_points(found: Findings) -> str:
    points = "Each point is a run."
    if all(arm.num_seeds < 2 for arm in found.analysis.arms):
        return points
    return (
        f"{points} A seed has the same height in every row. The bar below the points shows the mean"
        " and its 95 % interval over seeds (for losses, over clean ones); an arrow at its end: the"
        " interval goes on beyond the chart. Runs of one seed are alike, so the difference of two"
        " arms on the same seeds is known better than their bars suggest."
    )


SECTIONS = (
    Section(
        name="arms",
        heading="What happened",
        charts={"failures": _failures, "final-loss": _final_losses},
        reading=_reading_of_points,
        reading_of={
            "failures": "Non-finite batches are counted after the arm begins to act, on a"
            " logarithmic axis. A short grey tick at a point's height is the baseline with the same"
            " seed, counted from the same step. Pale points are runs that failed before the arm"
            " could act."
        },
        tables=[TableOf("What happened, by arm", lambda f, title: arms_table(f.arms, title=title))],
    ),
    Section(
        name="starts",
        heading="Saved models",
        tables=[
            TableOf(
                "Saved models before and after training",
                lambda f, title: saved_models_table(f.study, f.analysis, title=title),
            )
        ],
    ),
    Section(
        name="rates",
        heading="Learning rates",
        charts={"learning-rate": _learning_rates},
        reading=lambda _: (
            "Final validation loss in nats per token. Each point is a run, marked by its"
            " outcome; the line is the mean. A run that"
            " collapsed, was stopped or had non-finite validation windows is drawn at the loss of a"
            " uniform guess."
        ),
        tables=[
            TableOf(
                "Learning rates", lambda f, title: rates.sensitivity_table(f.families, title=title)
            )
        ],
    ),
    Section(
        name="branches",
        heading="Branches from a saved state",
        remark="All repeats start from one saved state of one run. They answer a question about"
        " that failure only: would a remedy that begins there have prevented it, and how often does"
        " the failure not occur in the A/A control?",
        tables=[
            TableOf(
                "Repeats from a saved state", lambda f, title: branches_table(f.study, title=title)
            )
        ],
    ),
    Section(
        name="comparisons",
        heading="Comparison with the baseline",
        remark="The change in each arm, the range of the A/A control, and the effect that a study"
        " of this size could detect.",
        tables=[
            TableOf("Failures and loss compared with the baseline", _comparisons(PRIMARY)),
            TableOf(
                "Other endpoints compared with the baseline",
                _comparisons(SECONDARY),
                "Batches, first steps, validation tokens and spikes",
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
        heading="Validation loss over the run",
        charts={"loss": _loss_curves},
        reading=lambda _: (
            "Each thin line is a seed. The thick line and the band show the mean and the range"
            " of the clean seeds. A cross marks a validation with non-finite windows; a line breaks"
            " where no window was finite. The dotted line is the step at which the arm begins to"
            " act."
            " Losses far above the others are drawn at the upper edge."
        ),
        tables=[
            TableOf(
                "Validation loss at each eleventh of the run",
                lambda f, title: loss_over_run_table(f.study, f.analysis, title=title),
            )
        ],
    ),
    Section(
        name="timeline",
        heading="Spikes and non-finite steps",
        charts={"timeline": _timeline},
        reading=lambda _: (
            "Each line is a run. Bars are steps with a non-finite loss or gradient. Small"
            " triangles above the line are finite spikes. A dark tick marks the end of the run."
        ),
    ),
    Section(
        name="load",
        heading="Load of the experts",
        remark="Every token is routed to top_k experts, so the mean load is top_k / E even if the"
        " router has collapsed: it says nothing about balance. MaxVio does: it is the load of the"
        " busiest expert minus the mean load, divided by the mean load.",
        charts={"load": _router_loads},
        reading=lambda _: (
            "Bars reach from the least to the most used expert of each layer, as shares of"
            " tokens, averaged over the last quarter of the run and over all seeds. The tick is the"
            " mean load."
        ),
        tables=[
            TableOf(
                "Load of the experts, by layer",
                lambda f, title: load_table(all_loads(f.study, f.analysis), f.study, title=title),
                "Values of every layer",
            )
        ],
    ),
    Section(
        name="alarms",
        heading="Early warnings",
        remark="A run warns before a non-finite step if a metric drifts towards a limit of its"
        " number format, once per kind of metric. The table shows the first warning of each run."
        " `guard.on_alarm=checkpoint` saves the state at a warning, for branches.",
        tables=[
            TableOf(
                "Early warnings, by run",
                lambda f, title: alarms_table(f.study, f.analysis, title=title),
                "Show every run",
                24,
            )
        ],
    ),
    Section(
        name="incidents",
        heading="Incidents",
        finding=_causes,
        remark="The module is the first one with a non-finite result. The step number links to the"
        " incident's page; `python -m src.replay incident=FOLDER` reruns that step.",
        tables=[
            TableOf(
                "What failed first, by run",
                lambda f, title: provenance.incidents_table(
                    f.study, f.analysis, title=title, folder=f.folder
                ),
                "Show every run",
                24,
            )
        ],
    ),
    Section(
        name="config",
        heading="Configuration",
        remark="The fields in which an arm differs from its baseline; all others are equal.",
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
                "Text samples",
                lambda f, title: samples_table(f.study, f.analysis, title=title, folder=f.folder),
            )
        ],
    ),
    Section(
        name="runs",
        heading="Every run",
        tables=[
            TableOf(
                "Every run",
                lambda f, title: runs_table(f.runs, title=title, links=f.links),
                "Show the table",
                24,
            )
        ],
    ),
)

CHARTS = {name: make for section in SECTIONS for name, make in section.charts.items()}
"""All charts of a report, by name."""
