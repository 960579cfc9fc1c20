"""Writes the report of a study: an HTML page, Markdown, CSV files and charts."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import InputError
from src.common.tracking_address import default_uri, given_uri
from src.study.analysis.analyse import analyse
from src.study.analysis.compare_arms import FAMILIES
from src.study.analysis.frames import headline
from src.study.before_reporting import keys_of, names_of, source_of, text_of
from src.study.read.collect import Study, collect
from src.study.read.from_csv import write_frame
from src.study.read.outside_runs import OutsideStudy, from_csv_file, from_mlflow
from src.study.report import study_page as page
from src.study.report.arms_table import SHORT
from src.study.report.outside_page import write_comparison
from src.study.report.sections import Findings
from src.study.report.several_studies import write_studies
from src.tracking.experiment_runs import experiment_runs
from src.tracking.push import SUMMARY


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """The files of a report."""

    page: Path
    """report.html."""
    files: list[Path]
    """All files, the page first. Charts are listed as their folder, so that links keep working."""
    headline: dict[str, float]
    """The metrics of the sweep's own run in MLflow."""


def report_command(given: Mapping[str, Any]) -> int:
    """`python -m src.report`: writes the report and prints its short table.

    Raises:
        InputError: there is no such study, table or experiment, or the folder cannot be written.
    """
    source = source_of(given)
    out = None if given["out"] is None else given_path(given, "out")
    if source in ("csv", "mlflow"):
        write_comparison(_outside(given, source), given["control"], out or Path("comparison"))
        return 0
    runs, family = given_path(given, "paths.runs"), given["family"]
    if family not in FAMILIES:
        raise InputError(f"family={family}: must be one of {', '.join(FAMILIES)}")
    studies = [collect(runs, name) for name in names_of(given, source)]
    if source == "studies":
        write_studies(studies, out or Path("comparison"), family=family)
    else:
        write_report(studies[0], out, family=family)
    return 0


def _outside(given: Mapping[str, Any], source: str) -> OutsideStudy:
    """The runs of a table or of an MLflow experiment."""
    keys = keys_of(given, source)
    if source == "csv":
        return from_csv_file(given_path(given, "csv"), **keys)
    name, uri = text_of("mlflow", given["mlflow"]), given_uri(given) or default_uri()
    return from_mlflow(experiment_runs(name, uri), name=name, **keys)


def write_report(
    study: Study | Path, out: Path | None = None, *, family: str = "study", show: bool = True
) -> ReportFiles:
    """Writes the report: page, Markdown, summary.md, CSV files and figures/.

    Args:
        study: the study, or the folder with its runs.
        out: the report's folder; if None, report/ in the study's folder.
        family: the arms over which p is adjusted, of FAMILIES.
        show: whether to print the answer, the short table and the paths.

    Raises:
        InputError: there is no such study, or the folder cannot be written.
    """
    if isinstance(study, Path):
        study = collect(study.parent, study.name)
    folder = study.folder / "report" if out is None else out
    analysis = analyse(study, family=family)
    report = page.build_report(Findings(study=study, analysis=analysis, folder=folder))
    repeat = shlex.join(
        [
            *("python", "-m", "src.report", f"study={study.name}"),
            *([] if family == "study" else [f"family={family}"]),
            *([] if study.folder.parent == Path("runs") else [f"paths.runs={study.folder.parent}"]),
        ]
    )
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, chart in report.charts.items():
            chart.save(folder / "figures", name)
        texts = {
            "report.html": page.to_html(report, repeat=repeat),
            "report.md": page.to_markdown(report, repeat=repeat, charts="figures"),
            SUMMARY: page.to_summary(report),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_frame(report.found.runs, folder / "report.csv")
        write_frame(report.found.arms, folder / "arms.csv")
    except OSError as error:
        raise InputError(f"out={folder}: cannot be written ({error.strerror})") from error
    names = ("report.html", "report.md", SUMMARY, "report.csv", "arms.csv", "figures")
    if show:
        for sentence in analysis.answer:
            terminal.say(sentence)
        for warning in analysis.warnings[: page.MOST_REMARKS]:
            terminal.warn(warning)
        more = len(analysis.warnings) - page.MOST_REMARKS
        if more > 0:
            terminal.warn(f"{more} more warnings in the report")
        report.arms.only(SHORT).show()
        terminal.say(f"report: {folder / 'report.html'} (and .md, .csv, arms.csv, figures)")
    return ReportFiles(
        page=folder / "report.html",
        files=[folder / name for name in names],
        headline=headline(analysis),
    )
