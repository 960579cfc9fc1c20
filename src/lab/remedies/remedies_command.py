"""The command `python -m src.lab remedies`: the matrix, and a remedy or failure added to it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from src.cli import command_line
from src.cli.field_checks import number, shown
from src.common import number_format, terminal
from src.common.errors import InputError, nearest
from src.lab.book.files import RESULTS_FILE, STUDY_FILE, StudyFolder
from src.lab.book.page_words import Measures
from src.lab.book.run_studies import book_folder, missing_cost, train_sweeps
from src.lab.remedies.effect import Effect
from src.lab.remedies.failure_files import (
    NOTHING,
    Failure,
    fits,
    read_failure,
    sweeps_of,
)
from src.stability import REMEDIES
from src.study.read.collect import collect
from src.study.report.make_report import write_report
from src.sweep.settings import MAX_JOBS

STUDY = "remedies"


def remedies(given: Mapping[str, Any]) -> int:
    """Shows the matrix of remedies and failures, or adds to it; returns the exit code.

    Raises:
        InputError: a field has a bad value, or the study has no results yet.
    """
    n_jobs = number(given, "n_jobs", int, least=1, most=MAX_JOBS)
    if not isinstance(given["plan"], bool):
        raise InputError(f"plan={shown(given['plan'])}: must be true or false")
    known = StudyFolder(folder=book_folder(given["paths"]) / STUDY)
    if given["add"] is None:
        return _show(_measures(known), given["failure"])
    if given["failure"] is not None:
        raise InputError(f"failure={shown(given['failure'])}: leave it out with add={given['add']}")
    places = {name: str(given["paths"][name]) for name in ("runs", "cache")}
    settings = [f"n_jobs={n_jobs}", "tracking=local"]
    settings += [f"paths.{name}='{place}'" for name, place in places.items()]
    addition = _addition(str(given["add"]), known)
    sweeps = [[*sweep, f"study={addition.study}", *settings] for sweep in addition.sweeps]
    missing_cost({addition.study: sweeps}, n_jobs=n_jobs)
    if given["plan"]:
        return command_line.OK
    code = train_sweeps(sweeps)
    if code > command_line.BAD_INPUT:
        terminal.say("stopped; the same command continues from here")
        return code
    new = _measures(_written(addition, Path(places["runs"])))
    if addition.remedy is None:
        return _show(new, addition.failures[0].name) or code
    _show_row(new, _measures(known), addition.remedy)
    return code


class _Addition:
    """What is to be trained for a remedy or a failure that is added."""

    def __init__(self, *, name: str, remedy: str | None, failures: Sequence[Failure]) -> None:
        self.study = f"{STUDY}-{name}"
        self.remedy = remedy
        self.failures = failures
        self.remedies: list[str] = []
        self.sweeps: list[list[str]] = []


def _addition(add: str, known: StudyFolder) -> _Addition:
    """The runs for a remedy's name, or for the file of a failure.

    Raises:
        InputError: it is neither, or does not fit.
    """
    plan = known.plan["of_failures"]
    if add.endswith((".yaml", ".yml")):
        failure = read_failure(Path(add))
        added = _Addition(name=failure.name, remedy=None, failures=[failure])
        added.remedies = list(plan["remedies"])
    elif add in REMEDIES:
        originals = [each for each in known.failures if each.repeats is None]
        fitting = [each for each in originals if fits(each.arguments, add)]
        if not fitting:
            raise InputError(f"add={add}: fits none of the failures")
        added = _Addition(name=add, remedy=add, failures=fitting)
        added.remedies = [add]
    else:
        hint = nearest(add, REMEDIES)
        raise InputError(
            f"add={add}: must be a remedy or the file of a failure (NAME.yaml); {hint}remedies:"
            f" {', '.join(REMEDIES)}"
        )
    for each in added.failures:
        added.sweeps += sweeps_of(each, remedies=added.remedies, seeds=str(plan["seeds"]))
    return added


def _written(addition: _Addition, runs: Path) -> StudyFolder:
    """A study folder with the results of what was added, beside its report."""
    report = write_report(collect(runs, addition.study), show=False).page.parent
    folder = report.parent / "remedies"
    (folder / "failures").mkdir(parents=True, exist_ok=True)
    for each in addition.failures:
        content = {
            "shows_as": each.shows_as,
            "says": each.says,
            "reports": each.reports,
            "arguments": list(each.arguments),
            "healthy": list(each.healthy),
        }
        (folder / "failures" / f"{each.name}.yaml").write_text(yaml.safe_dump(content))
    plan = {
        "failures": [each.name for each in addition.failures],
        "remedies": addition.remedies,
        "seeds": "0",
        "short": [],
        "family": "baseline",
    }
    (folder / STUDY_FILE).write_text(yaml.safe_dump(plan))
    shutil.copyfile(report / "report.csv", folder / RESULTS_FILE)
    return StudyFolder(folder=folder)


def _measures(folder: StudyFolder) -> Measures:
    if not folder.has_results:
        raise InputError(f"{folder.folder}: has no results; type make reproduce STUDIES={STUDY}")

    def no_others(name: str) -> Measures:
        raise InputError(f"{name}: only the results of {folder.name} are read here")

    return Measures(folder, others=no_others)


def _show(measures: Measures, failure: Any) -> int:
    """Prints the whole matrix, or all that is known of one failure."""
    if failure is None:
        names = [*measures.failures(), *measures.failures(NOTHING)]
        rows = [
            [remedy, *(measures.cell(name, remedy).replace("**", "*") for name in names)]
            for remedy in measures.remedies()
        ]
        terminal.table("how much of the damage each remedy undoes", ["remedy", *names], rows)
        terminal.say(
            "100 % is as healthy, 0 % as untreated; between stars: significant. The last column is"
            " the change in loss where nothing is broken, in nats."
        )
        return command_line.OK
    known = [*measures.failures(), *measures.failures(NOTHING), *measures.repeats()]
    if failure not in known:
        hint = nearest(str(failure), known)
        raise InputError(f"failure={failure}: {hint}must be one of {', '.join(known)}")
    found = measures.failure(failure)
    terminal.sentence(f"{failure}: {found.says}")
    unit = "nats" if found.shows_as == NOTHING else "share undone"
    rows = [
        _row(effect, is_share=found.shows_as != NOTHING) for effect in measures.effects(failure)
    ]
    if found.shows_as != NOTHING:
        share, healthy = measures.failing_share(failure), measures.healthy_failing_share(failure)
        terminal.sentence(f"Failing runs: {share:.0%} untreated, {healthy:.0%} without the cause.")
    columns = ["remedy", unit, "95 % interval", "p", "verdict"]
    terminal.table("the most helpful first", columns, rows)
    return command_line.OK


def _row(effect: Effect, *, is_share: bool) -> list[str]:
    factor, decimals = (100, 0) if is_share else (1, 3)
    unit = " %" if is_share else ""
    low, high = (number_format.fixed(factor * end, decimals) for end in (effect.low, effect.high))
    return [
        effect.remedy,
        number_format.fixed(factor * effect.undone, decimals) + unit,
        f"{low} to {high}{unit}",
        number_format.p_value(effect.p_value),
        effect.verdict,
    ]


def _show_row(new: Measures, known: Measures, remedy: str) -> None:
    """Prints the row of an added remedy, beside the best remedy that is known."""
    rows = []
    for name in [*new.failures(), *new.failures(NOTHING)]:
        effect = new.effect(name, remedy)
        others = known.effects(name)
        is_share = new.failure(name).shows_as != NOTHING
        better = sum(other.benefit > effect.benefit for other in others)
        best = f"{others[0].remedy} {known.cell(name, others[0].remedy)}".replace("**", "")
        place = f"{better + 1} of {len(others) + 1}" if is_share else ""
        rows.append([name, *_row(effect, is_share=is_share)[1:], place, best if is_share else ""])
    columns = ["failure", "effect", "95 % interval", "p", "verdict", "place", "best known"]
    terminal.table(f"what {remedy} does to each failure", columns, rows)
