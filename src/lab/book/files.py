"""The folder of a study in experiments/: what is run for it, what was predicted, what came out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.common.errors import InputError
from src.common.override_grammar import file_arguments
from src.config.schema import CONF
from src.study.read.collect import Study
from src.study.read.from_csv import read_frame, rebuilt

BOOK = CONF.parent / "experiments"

STUDY_FILE = "study.yaml"


RESULTS_FILE = "results.csv"


@dataclass(frozen=True, kw_only=True)
class BookFolder:
    """What the book has of a study, or of one large run."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the study or the run, which is that of its folder."""
        return self.folder.name

    @property
    def has_results(self) -> bool:
        """Whether anything of it has been run."""
        return (self.folder / RESULTS_FILE).is_file()

    @cached_property
    def results(self) -> pd.DataFrame:
        """results.csv, a row a run or a logged step."""
        return read_frame(self.folder / RESULTS_FILE)


class StudyFolder(BookFolder):
    """One study of the book."""

    @cached_property
    def plan(self) -> Mapping[str, Any]:
        """study.yaml: sweeps, each a list of overrides, and `short`, what makes a run of seconds.

        Raises:
            InputError: it is damaged.
        """
        file = self.folder / STUDY_FILE
        try:
            plan = yaml.safe_load(file.read_text(encoding="utf-8"))
            sweeps, short = plan["sweeps"], plan["short"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise InputError(f"{file}: must hold sweeps and short ({error})") from error
        lists = [short, *(sweeps if isinstance(sweeps, list) else [None])]
        if not sweeps or not all(isinstance(each, list) for each in lists):
            raise InputError(
                f"{file}: sweeps must be lists of overrides, one at least; short a list"
            )
        return {
            "sweeps": [file_arguments(list(map(str, sweep)), where=str(file)) for sweep in sweeps],
            "short": file_arguments(list(map(str, short)), where=str(file)),
        }

    def sweeps(self, *, short: bool = False) -> list[list[str]]:
        """The arguments of `python -m src.train --multirun`, sweep by sweep.

        Args:
            short: two seeds of a few steps.
        """
        last = [*(self.plan["short"] if short else []), f"study={self.name}"]
        # What is typed last wins.
        return [_joined(sweep, last) for sweep in self.plan["sweeps"]]

    @cached_property
    def study(self) -> Study:
        """The study, out of results.csv.

        Raises:
            InputError: the file is damaged.
        """
        try:
            study = rebuilt(self.name, self.results)
        except (KeyError, TypeError, ValueError) as error:
            file = self.folder / RESULTS_FILE
            raise InputError(f"{file}: is damaged ({type(error).__name__}: {error})") from error
        if not study.runs:
            raise InputError(f"{self.folder / RESULTS_FILE}: holds no run")
        return study


def _joined(sweep: list[str], last: list[str]) -> list[str]:
    """A field once, as `last` has it where both have it."""
    typed = {argument.partition("=")[0] for argument in last}
    return [*(a for a in sweep if a.partition("=")[0] not in typed), *last]


def studies(book: Path = BOOK) -> Iterator[StudyFolder]:
    """Those that are made of sweeps, by name."""
    for file in sorted(book.glob(f"*/{STUDY_FILE}")):
        yield StudyFolder(folder=file.parent)


def study_named(name: str, book: Path = BOOK) -> StudyFolder:
    """One of them.

    Raises:
        InputError: there is no such study.
    """
    known = {study.name: study for study in studies(book)}
    if name not in known:
        raise InputError(f"studies={name}: must be of {', '.join(known)}")
    return known[name]
