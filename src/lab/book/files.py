"""The folder of a study in experiments/: its plan, its predictions and its results."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.common.errors import InputError
from src.common.override_grammar import file_arguments
from src.config.hydra_compose import CONF
from src.lab.remedies.failure_files import Failure, read_failures, sweeps_of_study
from src.study.analysis.compare_arms import FAMILIES
from src.study.read.collect import Study
from src.study.read.from_csv import read_frame, rebuilt

BOOK = CONF.parent / "experiments"

STUDY_FILE = "study.yaml"


RESULTS_FILE = "results.csv"

FAILURE_FIELDS = ("failures", "remedies", "seeds")
"""Fields of study.yaml in a study of failures, which stand in place of `sweeps`."""


@dataclass(frozen=True, kw_only=True)
class BookFolder:
    """The folder of a study, or of one large run."""

    folder: Path

    @property
    def name(self) -> str:
        """The name of the study or run, which is the folder's name."""
        return self.folder.name

    @property
    def has_results(self) -> bool:
        """Whether it has been run."""
        return (self.folder / RESULTS_FILE).is_file()

    @cached_property
    def results(self) -> pd.DataFrame:
        """The content of results.csv, one row per run or per logged step."""
        return read_frame(self.folder / RESULTS_FILE)


class StudyFolder(BookFolder):
    """The folder of a study."""

    @cached_property
    def plan(self) -> Mapping[str, Any]:
        """The content of study.yaml: `sweeps`, lists of overrides, `short`, and `family`.

        `short` is a list of overrides that shorten a run to seconds. `family` is one of FAMILIES.
        A study of failures lists `failures`, `remedies` and `seeds` in place of `sweeps`.
        `withdrawn` says why a study is not run; it is empty for others.

        Raises:
            InputError: the file is damaged.
        """
        file = self.folder / STUDY_FILE
        try:
            plan = yaml.safe_load(file.read_text(encoding="utf-8"))
            short = plan["short"]
            of_failures = None
            if "failures" in plan:
                of_failures = {name: plan[name] for name in FAILURE_FIELDS}
            sweeps = [[]] if of_failures else plan["sweeps"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise InputError(f"{file}: must have sweeps and short ({error})") from error
        family = plan.get("family", "study")
        if family not in FAMILIES:
            raise InputError(f"{file}: family={family}: must be one of {', '.join(FAMILIES)}")
        lists = [short, *(sweeps if isinstance(sweeps, list) else [None])]
        if not sweeps or not all(isinstance(each, list) for each in lists):
            raise InputError(
                f"{file}: sweeps must be one or more lists of overrides, and short a list"
            )
        return {
            "sweeps": [file_arguments(list(map(str, sweep)), where=str(file)) for sweep in sweeps],
            "short": file_arguments(list(map(str, short)), where=str(file)),
            "family": family,
            "of_failures": of_failures,
            "withdrawn": " ".join(str(plan.get("withdrawn", "")).split()),
        }

    @cached_property
    def failures(self) -> list[Failure]:
        """The failures that the study is about, in its order; empty for other studies."""
        of_failures = self.plan["of_failures"]
        return [] if of_failures is None else read_failures(self.folder, of_failures["failures"])

    @cached_property
    def _sweeps(self) -> list[list[str]]:
        plan = self.plan
        if plan["of_failures"] is None:
            found: list[list[str]] = plan["sweeps"]
            return found
        # Composes every arm, which takes seconds, so pages do without.
        return sweeps_of_study(self.folder, plan["of_failures"])

    def sweeps(self, *, short: bool = False) -> list[list[str]]:
        """The arguments of `python -m src.train --multirun`, for each sweep.

        Args:
            short: run only two seeds of a few steps.
        """
        # The last of two values for a field wins.
        last = [*(self.plan["short"] if short else []), f"study={self.name}"]
        return [_joined(sweep, last) for sweep in self._sweeps]

    @property
    def family(self) -> str:
        """The arms over which p is adjusted: `family` of study.yaml, or the whole study."""
        if not (self.folder / STUDY_FILE).is_file():
            return "study"
        return str(self.plan["family"])

    @cached_property
    def study(self) -> Study:
        """The study, rebuilt from results.csv.

        Raises:
            InputError: the file is damaged.
        """
        try:
            study = rebuilt(self.name, self.results)
        except (KeyError, TypeError, ValueError) as error:
            file = self.folder / RESULTS_FILE
            raise InputError(f"{file}: is damaged ({type(error).__name__}: {error})") from error
        if not study.runs:
            raise InputError(f"{self.folder / RESULTS_FILE}: has no runs")
        return study


def _joined(sweep: list[str], last: list[str]) -> list[str]:
    """Both lists, without the fields of the first that the last overrides."""
    typed = {argument.partition("=")[0] for argument in last}
    return [*(a for a in sweep if a.partition("=")[0] not in typed), *last]


def studies(book: Path = BOOK) -> Iterator[StudyFolder]:
    """The studies that consist of sweeps, in order of names."""
    for file in sorted(book.glob(f"*/{STUDY_FILE}")):
        yield StudyFolder(folder=file.parent)


def study_named(name: str, book: Path = BOOK) -> StudyFolder:
    """The study with a name.

    Raises:
        InputError: there is no such study.
    """
    known = {study.name: study for study in studies(book)}
    if name not in known:
        raise InputError(f"studies={name}: must be one of {', '.join(known)}")
    return known[name]
