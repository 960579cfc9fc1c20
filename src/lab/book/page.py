"""Pages of the book: renders `<name>.md.jinja` with the study's results to `<name>.md`."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from src.common import number_format
from src.common.errors import InputError
from src.lab.audit.audit_page import AuditPage
from src.lab.book import scale
from src.lab.book.files import BOOK, STUDY_FILE, BookFolder, StudyFolder, studies
from src.lab.book.page_words import Measures
from src.lab.book.predictions import RIGHT, UNDECIDED, WRONG, predictions
from src.lab.book.select_arms import UndecidedError
from src.lab.book.single import single_runs
from src.lab.detector.detector_page import DetectorPage
from src.lab.simulation.power_page import PowerPage
from src.study.analysis.frames import arms_frame
from src.study.report.arms_table import arms_table
from src.study.report.table import escape_markdown

TEMPLATE = ".jinja"

FRONT = f"front.md{TEMPLATE}"
"""The template of the project README's part between the marks BEGIN and END."""

NEEDS = re.compile(r"\{# needs: (.*) #\}")
"""The first line of a template that needs the results of other studies."""

WIDTH = 120
"""Characters in a line."""

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

MARKS = {RIGHT: "right", WRONG: "**wrong**", UNDECIDED: "undecided"}


class Book:
    """All studies that have results, and the pages about them.

    Args:
        folder: experiments/.
    """

    def __init__(self, folder: Path = BOOK) -> None:
        self.folder = folder
        self.runs = single_runs(folder)
        self._measures: dict[str, Measures] = {}

    def measures(self, name: str) -> Measures:
        """The measures of one study.

        Raises:
            UndecidedError: the study has not been run.
        """
        if name not in self._measures:
            study = StudyFolder(folder=self.folder / name)
            if not study.has_results:
                raise UndecidedError(f"{name} has not been run")
            self._measures[name] = Measures(study, others=self.measures)
        return self._measures[name]

    def words(self, name: str) -> dict[str, Any]:
        """The names that a study's predictions and page may use."""
        measures = self.measures(name)
        return measures.words() | {
            "predictions_table": lambda: _predictions_table(
                measures.folder.folder, measures.words()
            ),
            "arms_table": lambda *columns: _arms_table(measures, columns),
        }

    def templates(self) -> list[Path]:
        """The templates of all pages for which the needed studies have been run."""
        found = sorted(self.folder.rglob(f"*.md{TEMPLATE}"))
        return [file for file in found if self._can_render(file)]

    def _can_render(self, file: Path) -> bool:
        """Whether its own study, and those that its first line names, have been run."""
        name = file.parent.name
        needed = [name] if name in self.runs or (file.parent / STUDY_FILE).is_file() else []
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        if found := NEEDS.fullmatch(first):
            needed += found[1].split(", ")
        return all(BookFolder(folder=self.folder / name).has_results for name in needed)

    def _link(self, name: str, place: Path) -> str:
        """A link to a study's page, with a note if the study cannot rank remedies."""
        page = self.folder / name / "README.md"
        template = page.with_name(page.name + TEMPLATE)
        if not (self._can_render(template) if template.is_file() else page.is_file()):
            return f"{name} (not run yet)"
        up = "" if place == self.folder else "../"
        return f"[{name}]({up}{name}/README.md){self._rank_note(name)}"

    def _rank_note(self, name: str) -> str:
        """A note if the study does not detect the effect of its positive control; else empty."""
        study = StudyFolder(folder=self.folder / name)
        is_run = study.has_results and (study.folder / STUDY_FILE).is_file()
        return "" if not is_run or self.measures(name).can_rank() else " (cannot rank remedies)"

    def _score(self, name: str) -> Mapping[str, int]:
        """The number of predictions by verdict."""
        words = self.runs[name].words if name in self.runs else self.measures(name).words()
        verdicts = [p.verdict(words) for p in predictions(self.folder / name)]
        return {mark: verdicts.count(mark) for mark in MARKS}

    def target(self, template: Path) -> Path:
        """The page that a template makes."""
        if template.name == FRONT:
            return self.folder.parent / "README.md"
        return template.with_name(template.name.removesuffix(TEMPLATE))

    def page(self, template: Path) -> str:
        """The text of a page. For the front page, the project's README with new results.

        Raises:
            InputError: the template asks for something that the results do not give.
        """
        unrun = [study for study in studies(self.folder) if not study.has_results]
        words: dict[str, Any] = {
            "study": self.measures,
            "studies": [study.name for study in studies(self.folder) if study.has_results],
            "unrun": [study.name for study in unrun if not study.plan["withdrawn"]],
            "withdrawn": {study.name: study.plan["withdrawn"] for study in unrun},
            "link": lambda name: self._link(name, template.parent),
            "rank_note": self._rank_note,
            "predicted": self._score,
            "described": scale.described,
            "waves": lambda name: scale.waves(self.measures(name).folder.study),
            "num_states": lambda name: scale.num_states(self.measures(name).folder.study),
            "makespan": scale.makespan,
            "run": lambda name: self.runs[name].words,
            "power": lambda: PowerPage(self.folder / "power"),
            "detector": lambda: DetectorPage(self.folder / "detector"),
            "audit": lambda: AuditPage(self.folder / "audit"),
            "measured": lambda shape: scale.measured(self.folder, shape=shape),
        }
        folder = template.parent
        if (folder / STUDY_FILE).is_file():
            words |= self.words(folder.name)
        elif folder.name in self.runs:
            own = self.runs[folder.name].words
            words |= own | {"predictions_table": lambda: _predictions_table(folder, own)}
        try:
            text = _environment().from_string(template.read_text(encoding="utf-8")).render(words)
        except Exception as error:
            # An expression may fail in any way. The error names the template, in one line.
            raise InputError(f"{template}: {type(error).__name__}: {error}") from error
        text = _wrapped(text)
        if template.name != FRONT:
            return text
        page = self.target(template)
        whole = page.read_text(encoding="utf-8") if page.is_file() else ""
        before, begin, rest = whole.partition(BEGIN)
        old, end, after = rest.partition(END)
        if not begin or not end or BEGIN in old + after or END in after:
            raise InputError(f"{page}: must contain {BEGIN} and {END}, once and in this order")
        return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "fixed": number_format.fixed,
        "signed": number_format.signed,
        "p": number_format.p_equals,
        "percent": lambda share: f"{share:.0%}".replace("%", " %"),
    }
    return environment


def _wrapped(text: str) -> str:
    """Rewraps paragraphs, whose line lengths change when numbers are filled in."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)
        + ("\n" if block.endswith("\n") else "")
        if re.match(r"\w|[*\"]|`(?!``)", block)
        else block
        for block in blocks
    )


def _predictions_table(folder: Path, words: Mapping[str, Any]) -> str:
    lines = ["| prediction, written before the runs | expected | measured | |", "|---|---|--:|---|"]
    for prediction in predictions(folder):
        found = prediction.found(words)
        shown = number_format.NONE if found is None else f"{found:.4g}"
        mark = MARKS[prediction.verdict(words)]
        lines.append(f"| {prediction.says} | {prediction.expected()} | {shown} | {mark} |")
    return "\n".join(lines)


def _arms_table(measures: Measures, columns: tuple[str, ...]) -> str:
    """Some columns of the report's first table, one row per arm."""
    frame = arms_frame(measures.folder.study, measures.analysis)
    table = arms_table(frame, title="").only(("arm", *columns))
    heads = " | ".join(column.name for column in table.columns)
    rule = "|".join("---" if column.is_text else "--:" for column in table.columns)
    body = [f"| {' | '.join(escape_markdown(c.plain) for c in row)} |" for row in table.rows]
    return "\n".join([f"| {heads} |", f"|{rule}|", *body])
