"""What the page of experiments/detector says, computed from results.csv and public.csv."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from src.lab.detector.cases import STEPS
from src.lab.detector.public_table import SUMMARY, TOOL_NAMES, PublicTable, markdown
from src.lab.detector.score import Score, score
from src.lab.detector.verdict import Verdict


class DetectorPage:
    """The numbers and tables of the page.

    Args:
        folder: experiments/detector.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def verdicts(self) -> Sequence[Verdict]:
        """The runs on unseen seeds."""
        with (self.folder / "results.csv").open(encoding="utf-8", newline="") as file:
            verdicts = [_verdict(row) for row in csv.DictReader(file)]
        return [verdict for verdict in verdicts if verdict.half == "unseen"]

    @cached_property
    def score(self) -> Score:
        """The counts over these runs."""
        return score(self.verdicts)

    @property
    def faults(self) -> str:
        """A table of the planted faults, in Markdown."""
        rows = []
        for case in dict.fromkeys(v.case for v in self.verdicts if v.kind != "healthy"):
            runs = [verdict for verdict in self.verdicts if verdict.case == case]
            failed = [verdict for verdict in runs if verdict.failed]
            leads = [_lead(verdict) for verdict in failed]
            lead = "sudden" if runs[0].kind == "sudden" else f"{median(leads or [0]):g}"
            causes = Counter(str(verdict.cause) for verdict in failed)
            named = ", ".join(cause for cause, _ in causes.most_common())
            rows.append([case, f"{len(failed)} of {len(runs)}", lead, named])
        head = ["fault", "failed", f"median lead, steps of {STEPS}", "cause named"]
        return markdown(head, rows, numbers=head[1:3])

    @cached_property
    def public(self) -> PublicTable:
        """The public failures."""
        return PublicTable.read(self.folder / "public.csv")

    @property
    def public_summary(self) -> str:
        """The tools, in Markdown."""
        return markdown(SUMMARY, self.public.summary(), numbers=SUMMARY[1:])

    @property
    def public_cases(self) -> str:
        """The public failures, in Markdown."""
        head = ["case", "kind", "first bad", *TOOL_NAMES.values()]
        return markdown(head, self.public.cases(), numbers=())


def _lead(verdict: Verdict) -> int:
    """Steps between warning and failure."""
    if not verdict.warned or verdict.first_nonfinite is None or verdict.alarm_step is None:
        return 0
    return verdict.first_nonfinite - verdict.alarm_step


def _verdict(row: dict[str, str]) -> Verdict:
    """A row of results.csv as it was before it was written."""
    values: dict[str, Any] = dict(row)
    words = {"": None, "True": True, "False": False}
    for field in fields(Verdict):
        text = row[field.name]
        if text in words:
            values[field.name] = words[text]
        elif text.isdecimal():
            values[field.name] = int(text)
    return Verdict(**values)
