"""Writes the report of a study: an HTML page, Markdown, CSV files and charts."""

import shlex
from collections.abc import Mapping, Sequence
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
from src.study.read.collect import Study, collect
from src.study.read.from_csv import write_frame
from src.study.read.outside_runs import OutsideStudy, from_csv_file, from_mlflow
from src.study.report import study_page as page
from src.study.report.outside_page import write_comparison
from src.study.report.sections import Findings
from src.study.report.several_studies import write_studies
from src.study.report.summary import SHORT
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


SOURCES = ("study", "studies", "csv", "mlflow")
"""Where runs come from: this project's folders, a table, or an MLflow experiment."""


def report_command(given: Mapping[str, Any]) -> int:
    """`python -m src.report`: writes the report and prints its short table.

    Raises:
        InputError: there is no such study, table or experiment, or the folder cannot be written.
    """
    named = [source for source in SOURCES if given[source] is not None]
    if len(named) != 1:
        shown = " ".join(f"{source}={given[source]}" for source in named) or "study=null"
        raise InputError(
            f"{shown}: name one of study=NAME, studies=[NAME,NAME], csv=FILE and mlflow=EXPERIMENT"
        )
    out = None if given["out"] is None else given_path(given, "out")
    if named[0] in ("csv", "mlflow"):
        write_comparison(_outside(given, named[0]), given["control"], out or Path("comparison"))
        return 0
    runs, family = given_path(given, "paths.runs"), given["family"]
    if family not in FAMILIES:
        raise InputError(f"family={family}: must be one of {', '.join(FAMILIES)}")
    if named == ["studies"]:
        studies = [collect(runs, name) for name in _names(given["studies"])]
        write_studies(studies, out or Path("comparison"), family=family)
    else:
        write_report(collect(runs, _study_name(given["study"])), out, family=family)
    return 0


def _study_name(value: Any) -> str:
    """The name of one study."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        listed = ",".join(map(str, value))
        raise InputError(f"study=[{listed}]: is one study; type 'studies=[{listed}]' for several")
    return _text("study", value)


def _names(value: Any) -> list[str]:
    """The names of several studies."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"studies={value}: must be a list, such as 'studies=[stability,hot]'")
    names = list(dict.fromkeys(_text("studies", name) for name in value))
    if len(names) < 2:
        raise InputError(f"studies={value}: must name two studies or more")
    return names


def _outside(given: Mapping[str, Any], source: str) -> OutsideStudy:
    """The runs of a table or of an MLflow experiment."""
    lacking = [field for field in ("arm", "seed", "endpoint") if given[field] is None]
    if lacking:
        what = "column" if source == "csv" else "param, tag or metric"
        raise InputError(f"{lacking[0]}=null: name the {what} of the {lacking[0]}")
    keys = {field: _text(field, given[field]) for field in ("arm", "seed", "endpoint")}
    if source == "csv":
        return from_csv_file(given_path(given, "csv"), **keys)
    name, uri = _text("mlflow", given["mlflow"]), given_uri(given) or default_uri()
    return from_mlflow(experiment_runs(name, uri), name=name, **keys)


def _text(field: str, value: Any) -> str:
    """A name or a path, which the command line may have parsed as a number."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    shown = "null" if value is None else value
    raise InputError(f"{field}={shown}: must be text")


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
