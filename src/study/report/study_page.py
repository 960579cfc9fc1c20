"""Renders the report as one self-contained HTML page, and as Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src.common import number_format
from src.study.report import provenance
from src.study.report.arms_table import SHORT
from src.study.report.draw import TEMPLATES, DrawnChart, vega_script
from src.study.report.sections import SECTIONS, Findings, Section, TableOf
from src.study.report.table import Table, escape_markdown

NOTEBOOK_STYLE = (
    ".study-table small { display: block; opacity: .75; }"
    " .study-table :is(th, td) { vertical-align: top; }"
    " .study-table .text { text-align: left; }"
)

MOST_REMARKS = 6
"""The number of remarks that are always shown; the others are folded."""


@dataclass(frozen=True, kw_only=True)
class MadeSection:
    """A section filled with this study's results."""

    section: Section
    finding: str
    how_to_read: str
    """How to read all its charts."""
    charts: Mapping[str, DrawnChart]
    """The charts that have data, by name."""
    tables: Sequence[tuple[TableOf, Table]]
    """The tables that have rows."""

    @property
    def reading(self) -> str:
        """How to read the charts that are shown."""
        own = [text for name, text in self.section.reading_of.items() if name in self.charts]
        return " ".join([self.how_to_read, *own]).strip() if self.charts else ""

    def shown_title(self, table: TableOf) -> str:
        """The title above a table; empty if the section's heading says it already.

        Router and preset, which a table's own title names, stand at the top of the page.
        """
        is_alone = not self.charts and table is self.tables[0][0]
        return "" if is_alone or table.title == self.section.heading else table.title


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report, before it is rendered as HTML or Markdown."""

    found: Findings
    sections: Sequence[MadeSection]
    """The sections that are not empty; the first never is."""

    @property
    def charts(self) -> dict[str, DrawnChart]:
        """The charts of all sections, by name."""
        return {name: chart for made in self.sections for name, chart in made.charts.items()}

    @property
    def arms(self) -> Table:
        """The first table: the outcomes, with one row per arm."""
        return self.sections[0].tables[0][1]

    @property
    def facts(self) -> list[str]:
        """The size of the study in one line: runs, arms, seeds, setting, models."""
        study, arms = self.found.study, self.found.analysis.arms
        seeds = {run.seed for run in study.runs}
        facts = [
            _count(len(study.runs), "run"),
            _count(len(arms), "arm"),
            _count(len(seeds), "seed"),
            self.found.setting,
        ]
        models = dict.fromkeys(run.axes["model"] for run in study.runs)
        return [*facts, f"model {' and '.join(models)}"]

    @property
    def remarks(self) -> list[str]:
        """The warnings, and the number of shared steps."""
        saved, steps = provenance.steps_saved(self.found.study)
        remarks = list(self.found.analysis.warnings)
        if saved:
            remarks.append(
                f"{saved:,} of {steps:,} steps are shared with a baseline: they were trained once,"
                " bitwise as each arm would have trained them."
            )
        return remarks

    @property
    def origins(self) -> Table:
        """Code, libraries and machines of the runs."""
        title = f"Where the runs come from ({self.found.setting})"
        return provenance.origins(self.found.study, title=title)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def build_report(found: Findings) -> Report:
    """Draws the charts and fills the tables of all sections that are not empty."""
    sections = []
    for section in SECTIONS:
        made_charts = {name: make(found) for name, make in section.charts.items()}
        charts = {name: DrawnChart(chart) for name, chart in made_charts.items() if chart}
        tables = [
            (each, each.make(found, f"{each.title} ({found.setting})")) for each in section.tables
        ]
        shown = [(each, table) for each, table in tables if table.rows]
        if charts or shown:
            sections.append(
                MadeSection(
                    section=section,
                    finding=section.finding(found),
                    how_to_read=section.reading(found),
                    charts=charts,
                    tables=shown,
                )
            )
    return Report(found=found, sections=sections)


def to_html(report: Report, *, repeat: str) -> str:
    """The HTML page; `repeat` is the command that writes it again."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            study=report.found.study,
            analysis=report.found.analysis,
            commands=provenance.commands(report.found.study),
            repeat=repeat,
            most=MOST_REMARKS,
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            vega=vega_script(),
            script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        )
    )


def table_html(table: Table) -> str:
    """A single table as HTML, for notebooks, which have no styles for its small print."""
    table_text = environment().get_template("tables.html").module.show(table)  # type: ignore[attr-defined]
    return f'<style>{NOTEBOOK_STYLE}</style><div class="study-table">{table_text}</div>'


def environment() -> Environment:
    """The templates of pages."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["with_code"] = _with_code
    found.globals["none_text"] = number_format.NONE
    return found


def _with_code(text: str) -> Markup:
    """Escaped text, in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False)))


def to_markdown(report: Report, *, repeat: str, charts: str) -> str:
    """The report as Markdown; `charts` is the folder of the SVG files."""
    lines = [
        f"# {escape_markdown(report.found.study.name)}",
        "",
        escape_markdown(" · ".join(report.facts)),
    ]
    lines += ["", *(f"{escape_markdown(sentence)}\n" for sentence in report.found.analysis.answer)]
    lines += [f"- Note: {escape_markdown(remark)}" for remark in report.remarks]
    for part in report.sections:
        section = part.section
        shown = [escape_markdown(part.finding), section.remark]
        shown += [f"![{section.heading}]({charts}/{name}.svg)" for name in part.charts]
        shown += [part.reading]
        shown += [table.markdown() for _, table in part.tables]
        lines += ["", f"## {section.heading}", "", "\n\n".join(filter(None, shown))]
    lines += ["", "## How to reproduce it", "", "```"]
    commands = provenance.commands(report.found.study)
    lines += [*(_one_line(command) for command in commands), repeat, "```", ""]
    return "\n".join(lines)


def to_summary(report: Report) -> str:
    """The answer and the short table of arms as Markdown, for MLflow."""
    answer = [f"{escape_markdown(sentence)}\n" for sentence in report.found.analysis.answer]
    table = report.arms.only(SHORT).markdown(with_notes=False)
    return "\n".join([*answer, table, ""])


def _one_line(command: str) -> str:
    """A command in one line that cannot end its code block."""
    return " ".join(command.replace("```", "'''").split())
