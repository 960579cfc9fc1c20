"""The report as one page of HTML that loads nothing from outside, and as Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src.study.report import provenance
from src.study.report.draw import TEMPLATES, DrawnChart, vega_script
from src.study.report.sections import SECTIONS, Findings, Section, TableOf
from src.study.report.table import Table, escape_markdown

MOST_REMARKS = 6
"""Remarks that are shown at once."""


@dataclass(frozen=True, kw_only=True)
class MadeSection:
    """A section with what this study shows in it."""

    section: Section
    finding: str
    charts: Mapping[str, DrawnChart]
    """Those that there are, by name."""
    tables: Sequence[tuple[TableOf, Table]]
    """Those that have rows."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report shows, before it is HTML or Markdown."""

    found: Findings
    sections: Sequence[MadeSection]
    """Those that show something; the first is always there."""

    @property
    def charts(self) -> dict[str, DrawnChart]:
        """All of them, by name."""
        return {name: chart for made in self.sections for name, chart in made.charts.items()}

    @property
    def facts(self) -> list[str]:
        """The study in a line: how much of what."""
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
        """What a reader must know of the runs."""
        saved, steps = provenance.steps_saved(self.found.study)
        remarks = list(self.found.analysis.warnings)
        if saved:
            remarks.append(
                f"{saved:,} of {steps:,} steps were not trained anew but taken from shared"
                " beginnings, bitwise as they would have come out."
            )
        return remarks

    @property
    def origins(self) -> Table:
        """Where its runs come from."""
        title = f"Where the runs come from ({self.found.setting})"
        return provenance.origins(self.found.study, title=title)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def made(found: Findings) -> Report:
    """Draws and fills all sections that have something to show."""
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
                    section=section, finding=section.finding(found), charts=charts, tables=shown
                )
            )
    return Report(found=found, sections=sections)


def to_html(report: Report, *, repeat: str) -> str:
    """The page; `repeat` is the command that writes it again."""
    return (
        _environment()
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
    environment.filters["with_code"] = _with_code
    return environment


def _with_code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False)))


def to_markdown(report: Report, *, repeat: str, charts: str) -> str:
    """The same for those who read Markdown; `charts` is the folder of the SVG files."""
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
        shown += [section.reading if part.charts else ""]
        shown += [table.markdown() for _, table in part.tables]
        lines += ["", f"## {section.heading}", "", "\n\n".join(filter(None, shown))]
    lines += ["", "## How to repeat it", "", "```"]
    commands = provenance.commands(report.found.study)
    lines += [*(_one_line(command) for command in commands), repeat, "```", ""]
    return "\n".join(lines)


def _one_line(command: str) -> str:
    """A command that cannot end its block of code."""
    return " ".join(command.replace("```", "'''").split())
