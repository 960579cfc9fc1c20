"""The table of the public failures, read from public.csv: what each tool noticed and named."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOL_NAMES = {
    "plain_loop": "plain loop",
    "nonfinite": "nonfinite",
    "detect_anomaly": "detect_anomaly",
    "underflow_overflow": "DebugUnderflowOverflow",
}
"""The tools as people know them, by the beginning of their columns."""

NAMED = {"place": "operation or module", "line": "line", "cause": "cause"}
"""What a tool may name, by the end of its column."""


@dataclass(frozen=True)
class PublicTable:
    """The rows of public.csv. `compare_tools` says what their words mean."""

    rows: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, file: Path) -> "PublicTable":
        """Reads public.csv."""
        with file.open(encoding="utf-8", newline="") as handle:
            return cls(list(csv.DictReader(handle)))

    def count(self, tool: str, column: str, *answers: str) -> int:
        """The number of cases in which a column of a tool has one of these answers."""
        return sum(row[f"{tool}_{column}"] in answers for row in self.rows)

    def right(self, tool: str, column: str) -> str:
        """How often a tool named the right thing, such as `7 of 26`; `never named` if it cannot."""
        right, wrong = self.count(tool, column, "yes"), self.count(tool, column, "no")
        return f"{right} of {right + wrong}" if right + wrong else "never named"

    def summary(self) -> list[list[str]]:
        """A row for each tool, below the columns of SUMMARY."""
        return [
            [
                name,
                *(str(self.count(tool, "detected", answer)) for answer in _DETECTED),
                *(self.right(tool, column) for column in NAMED),
            ]
            for tool, name in TOOL_NAMES.items()
        ]

    def cases(self) -> list[list[str]]:
        """A row for each case: its link, its kind, what fails, and the mark of each tool."""
        return [
            [
                f"[{row['case']}]({row['source']})",
                row["kind"],
                row["first_bad"],
                *(mark(row, tool) for tool in TOOL_NAMES),
            ]
            for row in self.rows
        ]


_DETECTED = {"yes": "at the failing step", "late": "later", "early": "earlier", "no": "not at all"}

SUMMARY = ["tool", *_DETECTED.values(), *NAMED.values()]
"""The head of the summary."""


def mark(row: Mapping[str, str], tool: str) -> str:
    """What a tool got right of a case: `step, operation, line`; or `late` and such."""
    detected = row[f"{tool}_detected"]
    if detected == "no":
        return "not noticed"
    if detected != "yes":
        return f"{detected}, step {row[f'{tool}_step']} for {row['failing_step']}"
    place = "module" if tool == "underflow_overflow" else "operation"
    words = {"place": place, "line": "line", "cause": "cause"}
    right = [word for column, word in words.items() if row[f"{tool}_{column}"] == "yes"]
    return ", ".join(["step", *right])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str]) -> str:
    """A table in Markdown.

    Args:
        head: the names of the columns.
        rows: the cells.
        numbers: the columns that hold numbers and are aligned right.
    """
    rule = "|".join("--:" if name in numbers else "---" for name in head)
    return "\n".join([_line(head), f"|{rule}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
