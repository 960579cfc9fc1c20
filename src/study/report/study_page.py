"""The report as one page of HTML that loads nothing from outside, and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src.study.analysis import rates
from src.study.analysis.results import Analysis
from src.study.analysis.rows import arm_rows, run_rows
from src.study.read.collect import Study
from src.study.report import figures, provenance, rate_figure
from src.study.report.alarms import alarms_table
from src.study.report.averted import averted_table
from src.study.report.curves import loss_curves
from src.study.report.elevenths import elevenths_table
from src.study.report.router_load import IDENTITY, all_loads, load_drawings, load_table
from src.study.report.sample_texts import samples_table
from src.study.report.starts import starts_table
from src.study.report.summary import arms_table
from src.study.report.svg import Drawing, together
from src.study.report.table import Table, escape_markdown, setting
from src.study.report.tables import (
    PRIMARY,
    SECONDARY,
    comparisons_table,
    equal_cost_table,
    runs_table,
)
from src.study.report.timeline import timeline

TEMPLATES = Path(__file__).parent / "templates"

MOST_REMARKS = 6
"""Remarks that are shown at once."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report shows, before it is HTML or Markdown."""

    study: Study
    analysis: Analysis
    setting: str
    tables: Mapping[str, Table]
    failures: Drawing
    losses: Drawing | None
    rates: Drawing | None
    curves: Sequence[Drawing]
    timeline: Drawing
    loads: Sequence[Drawing]

    @property
    def files(self) -> dict[str, Drawing]:
        """Drawings that are written as files too, by name; empty ones are left out."""
        files = {"failures": self.failures, "timeline": self.timeline}
        if self.losses is not None:
            files["final-loss"] = self.losses
        if self.rates is not None:
            files["learning-rate"] = self.rates
        if self.curves:
            files["loss"] = together(self.curves, columns=4)
        if self.loads:
            files["load"] = together(self.loads, columns=4)
        return files

    @property
    def facts(self) -> list[str]:
        """The study in a line: how much of what."""
        study, arms = self.study, self.analysis.arms
        seeds = {run.seed for run in study.runs}
        facts = [
            _count(len(study.runs), "run"),
            _count(len(arms), "arm"),
            _count(len(seeds), "seed"),
            self.setting,
        ]
        models = dict.fromkeys(run.axes["model"] for run in study.runs)
        return [*facts, f"model {' and '.join(models)}"]

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the runs."""
        saved, steps = provenance.steps_saved(self.study)
        remarks = list(self.analysis.warnings)
        if saved:
            remarks.append(
                f"{saved:,} of {steps:,} steps were not trained anew but taken from shared"
                " beginnings, bitwise as they would have come out."
            )
        return remarks


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def content(study: Study, analysis: Analysis, *, folder: Path) -> Content:
    """Makes tables and drawings.

    Args:
        study: the runs.
        analysis: what they show.
        folder: where the report will lie, for links.
    """
    named = setting(study)
    arms, runs = arm_rows(study, analysis), run_rows(study, analysis)
    loads, families = all_loads(study, analysis), rates.families(study)
    tables = {
        "arms": arms_table(arms, title=f"What happened, by arm ({named})"),
        "averted": averted_table(study, title=f"Would it have been averted? ({named})"),
        "comparisons": comparisons_table(
            arms, endpoints=PRIMARY, title=f"Failures and loss against the baseline ({named})"
        ),
        "secondary": comparisons_table(
            arms, endpoints=SECONDARY, title=f"Other endpoints against the baseline ({named})"
        ),
        "starts": starts_table(
            study, analysis, title=f"Saved models before and after training ({named})"
        ),
        "rates": rates.sensitivity_table(families, title=f"Learning rates ({named})"),
        "cost": equal_cost_table(arms, title=f"Loss at equal cost ({named})"),
        "elevenths": elevenths_table(
            study, analysis, title=f"Validation loss at each eleventh of the run ({named})"
        ),
        "load": load_table(loads, study, title=f"Load of the experts, by layer ({named})"),
        "alarms": alarms_table(study, analysis, title=f"Early warnings, by run ({named})"),
        "incidents": provenance.incidents_table(
            study, analysis, title=f"What failed first, by run ({named})", folder=folder
        ),
        "config": provenance.config_table(
            study, analysis, title=f"Differences in configuration ({named})"
        ),
        "samples": samples_table(
            study, analysis, title=f"What the models write ({named})", folder=folder
        ),
        "runs": runs_table(runs, title=f"Every run ({named})"),
        "origins": provenance.origins(study, title=f"Where the runs come from ({named})"),
    }
    return Content(
        study=study,
        analysis=analysis,
        setting=named,
        tables=tables,
        failures=figures.failures(study, analysis),
        losses=figures.final_losses(study, analysis),
        rates=rate_figure.drawing(families),
        curves=loss_curves(study, analysis),
        timeline=timeline(study, analysis),
        loads=load_drawings(loads) if loads else [],
    )


def to_html(report: Content, *, repeat: str) -> str:
    """The page; `repeat` is the command that writes it again."""
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            study=report.study,
            analysis=report.analysis,
            tables=report.tables,
            legend=[(Markup(point), words) for point, words in figures.legend(report.study)],
            identity=IDENTITY,
            causes=provenance.causes(report.study),
            commands=provenance.commands(report.study),
            repeat=repeat,
            most=MOST_REMARKS,
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        )
    )


def table_html(table: Table) -> str:
    """One table by itself, as notebooks show it."""
    return str(_environment().get_template("tables.html").module.show(table))  # type: ignore[attr-defined]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Drawings have escaped their texts themselves.
    environment.filters["drawn"] = lambda drawing: Markup(drawing.svg())
    return environment


MARKDOWN_SECTIONS = (
    ("What happened", "", ("failures", "final-loss"), ("arms",)),
    ("Saved models", "", (), ("starts",)),
    ("Learning rates", "", ("learning-rate",), ("rates",)),
    ("Counterfactuals", "", (), ("averted",)),
    ("Against the baseline", "", (), ("comparisons", "secondary")),
    ("Loss at equal cost", "", (), ("cost",)),
    ("Loss over the run", "", ("loss",), ("elevenths",)),
    ("Spikes and non-finite steps", "", ("timeline",), ()),
    ("Load of the experts", IDENTITY, ("load",), ()),
    ("Early warnings", "", (), ("alarms",)),
    ("Incidents", "", (), ("incidents",)),
    ("Configuration", "", (), ("config",)),
    ("Samples", "", (), ("samples",)),
    ("Every run", "", (), ("runs",)),
)
"""Heading, remark, drawings, tables; a section of which nothing is there is left out."""


def to_markdown(report: Content, *, repeat: str, drawings: str) -> str:
    """The same for those who read Markdown; `drawings` is the folder of the SVG files."""
    lines = [
        f"# {escape_markdown(report.study.name)}",
        "",
        escape_markdown(" · ".join(report.facts)),
    ]
    lines += ["", *(f"{escape_markdown(sentence)}\n" for sentence in report.analysis.answer)]
    lines += [f"- Note: {escape_markdown(remark)}" for remark in report.remarks]
    files = report.files
    for heading, remark, names, tables in MARKDOWN_SECTIONS:
        shown = [f"![{heading}]({drawings}/{name}.svg)" for name in names if name in files]
        shown += [report.tables[name].markdown() for name in tables if report.tables[name].rows]
        if shown:
            lines += ["", f"## {heading}", ""]
            lines += [f"{remark}\n"] if remark else []
            lines.append("\n\n".join(shown))
    lines += ["", "## How to repeat it", "", "```"]
    lines += [*(_one_line(c) for c in provenance.commands(report.study)), repeat, "```", ""]
    return "\n".join(lines)


def _one_line(command: str) -> str:
    """A command that cannot end its block of code."""
    return " ".join(command.replace("```", "'''").split())
