"""The commands `reproduce` and `book` of `python -m src.lab`."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.cli import command_line
from src.cli.field_checks import number, shown
from src.common import terminal
from src.common.errors import InputError
from src.lab.book import book_charts
from src.lab.book.compare import Comparison, compare
from src.lab.book.files import BOOK, STUDY_FILE, StudyFolder, studies, study_named
from src.lab.book.page import TEMPLATE, Book
from src.lab.book.single import FIGURE, SingleRun, import_run, single_runs
from src.lab.remedies import matrix_chart
from src.run.resume import finished_record
from src.study.analysis.endpoints import has_ended
from src.study.analysis.frames import arms_frame
from src.study.read.collect import collect
from src.study.read.from_csv import read_frame, write_frame
from src.study.report.make_report import write_report
from src.sweep.plan import make_plan
from src.sweep.preview import Cost, Estimator
from src.sweep.settings import MAX_JOBS


def reproduce(given: Mapping[str, Any]) -> int:
    """Reruns studies and compares them with the book; returns the exit code.

    Raises:
        InputError: a field has a bad value.
    """
    n_jobs = number(given, "n_jobs", int, least=1, most=MAX_JOBS)
    if not isinstance(given["plan"], bool):
        raise InputError(f"plan={shown(given['plan'])}: must be true or false")
    paths = _paths(given)
    chosen = _chosen(given["studies"], book_folder(paths))
    for study in chosen:
        # Reads the book's results now, so that a damaged file is not found after hours.
        _ = study.study if study.has_results else None
    places = [f"paths.{name}='{paths[name]}'" for name in ("runs", "cache")]
    settings = [f"n_jobs={n_jobs}", "tracking=local", *places]
    sweeps = {study.name: [[*s, *settings] for s in study.sweeps()] for study in chosen}
    terminal.say(f"composing the runs of {len(sweeps)} studies: up to a minute")
    num_runs = missing_cost(sweeps, n_jobs=n_jobs)
    if given["plan"]:
        return command_line.OK
    failed = []
    for name, each in sweeps.items():
        code = train_sweeps(each)
        if code > command_line.BAD_INPUT:
            terminal.say("stopped; the same command continues from here")
            return code
        failed += [name] if code else []
    terminal.say(f"{num_runs} runs were needed; the others were already in {paths['runs']}")
    return _report(chosen, Path(str(paths["runs"])), failed=failed)


def train_sweeps(sweeps: Sequence[Sequence[str]]) -> int:
    """Trains sweeps one after the other; returns the first code that is not 0, else 0.

    A sweep whose runs failed does not keep the others from being trained; one that is stopped does.
    """
    # Imported here, because it imports all that training needs.
    from src.sweep.start import train

    first = command_line.OK
    for sweep in sweeps:
        code = train(["--multirun", *sweep])
        if code > command_line.BAD_INPUT:
            return code
        first = first or code
    return first


def _paths(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The folders; only the book may be null.

    Raises:
        InputError: a value is not a folder.
    """
    paths = given["paths"]
    if not isinstance(paths, Mapping):
        raise InputError(f"paths={paths}: has the wrong type; set paths.runs to a folder")
    for name, place in paths.items():
        if not (isinstance(place, str) and place) and (name, place) != ("book", None):
            raise InputError(f"paths.{name}={shown(place)}: must be a folder")
    return paths


def book_folder(paths: Mapping[str, Any]) -> Path:
    """The folder `paths.book`, or that of this project if it is null.

    Raises:
        InputError: there is no such folder.
    """
    book = BOOK if paths["book"] is None else Path(str(paths["book"]))
    if not book.is_dir():
        raise InputError(f"paths.book={book}: no such folder")
    return book


def _chosen(value: Any, book: Path) -> list[StudyFolder]:
    if value is None:
        found = [study for study in studies(book) if not study.plan["withdrawn"]]
        if not found:
            raise InputError(f"paths.book={book}: has no study (<name>/{STUDY_FILE})")
        return found
    names = value if isinstance(value, list) else [value]
    if single := single_runs(book).keys() & set(map(str, names)):
        raise InputError(f"studies={single.pop()}: is a single large run; see its page")
    if not names:
        raise InputError("studies=[]: is empty; null means all studies")
    return [study_named(str(name), book) for name in names]


def missing_cost(sweeps: Mapping[str, Sequence[Sequence[str]]], *, n_jobs: int) -> int:
    """Prints the cost of the missing runs; returns their number."""
    rows, whole = [], Cost()
    for name, each in sweeps.items():
        cost, estimator = Cost(), Estimator()
        # By folder, because several sweeps may contain the same baseline.
        cells = {cell.folder: cell for sweep in each for cell in make_plan("train", sweep).cells}
        for cell in cells.values():
            if finished_record(cell.config, cell.config.config_hash()) is None:
                cost.add(estimator.cost(cell))
        whole.add(cost)
        rows.append([name, str(cost.runs), f"{cost.steps:,}", _time(cost, n_jobs)])
    terminal.table("runs to make", ["study", "runs", "steps", f"time with n_jobs={n_jobs}"], rows)
    time = _time(whole, n_jobs)
    terminal.say(
        f"{whole.runs} runs, {time} in total; Ctrl-C stops, and the same command continues"
    )
    return whole.runs


def _time(cost: Cost, n_jobs: int) -> str:
    if cost.seconds is None:
        return "unknown time"
    return f"about {terminal.duration(cost.seconds / n_jobs)}"


def _report(chosen: Sequence[StudyFolder], runs: Path, *, failed: Sequence[str]) -> int:
    rows, agrees = [], not failed
    for study in chosen:
        written = write_report(collect(runs, study.name), show=False)
        if not study.has_results:
            rows.append([study.name, "not in the book", "", ""])
            continue
        found = compare(study.name, study.results, read_frame(written.page.parent / "report.csv"))
        agrees &= found.agrees
        rows.append([study.name, *_comparison_cells(found)])
    terminal.table(
        "the book compared with the runs here",
        ["study", "runs bitwise equal", "differing columns", "significantly different arms"],
        rows,
    )
    terminal.say(
        "On the same machine with the same versions, every value except the seconds should be"
        " bitwise equal. On others rounding differs and chaotic failures come at other steps, but"
        " no arm should differ significantly (Fisher's and Welch's tests with Holm's correction at"
        " 0.05; with ten seeds they detect only large changes)."
    )
    for name in dict.fromkeys(failed):
        terminal.error(f"{name}: some runs failed")
    return command_line.OK if agrees else command_line.FAILURE


def _comparison_cells(found: Comparison) -> list[str]:
    missing = f", {len(found.missing)} not run" if found.missing else ""
    return [
        f"{found.num_equal} of {found.num_runs}{missing}",
        ", ".join(found.differing[:4]) + (" ..." if len(found.differing) > 4 else ""),
        ", ".join(found.different_arms) or "none",
    ]


def write_book(given: Mapping[str, Any]) -> int:
    """Imports the runs of studies into the book and renders its pages; returns the exit code.

    Raises:
        InputError: a study has no runs, or a page asks for something its results do not give.
    """
    paths = _paths(given)
    runs, folder = Path(str(paths["runs"])), book_folder(paths)
    swept, single = _to_import(given["studies"], folder)
    for study in swept:
        _import_study(study, runs)
        terminal.say(f"{study.folder}: results.csv, arms.csv")
    for run in single:
        import_run(run, runs)
        terminal.say(f"{run.folder}: results.csv, and incident.json if there was an incident")
    book = Book(folder)
    # Renders all pages before it writes any: if one fails, none is written.
    texts = {book.target(template): book.page(template) for template in book.templates()}
    for study in studies(folder):
        template = study.folder / f"README.md{TEMPLATE}"
        if study.has_results and template.is_file():
            measures = book.measures(study.name)
            write_frame(arms_frame(study.study, measures.analysis), study.folder / "arms.csv")
            drawn = book_charts.study_charts(book.measures(study.name), template)
            texts |= {study.folder / "figures" / name: svg for name, svg in drawn.items()}
            if study.name == book_charts.FRONT_STUDY:
                front = book_charts.front_chart(book.measures(study.name))
                texts[folder / book_charts.FRONT_CHART] = front
            if study.name == matrix_chart.STUDY:
                shown = matrix_chart.matrix_chart(book.measures(study.name))
                texts[folder / matrix_chart.CHART] = shown
    for run in book.runs.values():
        if run.has_results:
            texts[run.folder / FIGURE] = book_charts.run_chart(run)
    for page, text in texts.items():
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
        terminal.say(str(page))
    return command_line.OK


def _to_import(value: Any, folder: Path) -> tuple[list[StudyFolder], list[SingleRun]]:
    """The studies and single runs that the field `studies` names; none if it is null."""
    if value is None:
        return [], []
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    known = single_runs(folder)
    single = [known[name] for name in names if name in known]
    swept = [name for name in names if name not in known]
    # An empty list gets the same error as for studies.
    return _chosen(swept, folder) if swept or not single else [], single


def _import_study(study: StudyFolder, runs: Path) -> None:
    """Copies results.csv and arms.csv into the book."""
    found = collect(runs, study.name)
    if found.damages:
        # A report may leave out a damaged run, the book may not.
        raise InputError(f"studies={study.name}: {found.damages[0]}")
    for run in found.runs:
        if not has_ended(run):
            raise InputError(f"studies={study.name}: {run.name} has not ended ({run.status})")
    report = write_report(found, show=False).page.parent
    shutil.copyfile(report / "report.csv", study.folder / "results.csv")
    shutil.copyfile(report / "arms.csv", study.folder / "arms.csv")
    shutil.rmtree(study.folder / "figures", ignore_errors=True)
