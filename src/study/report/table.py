"""Tables, and their forms: HTML cells, Markdown, the terminal."""

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from src.common import number_format, terminal
from src.study.analysis.frames import ENDPOINTS
from src.study.read.collect import Study

Row = Mapping[str, Any]
"""A row of the frame of runs or of arms."""

MARK = "†"
"""Marks every loss whose validation had non-finite windows."""

MARK_REMARK = (
    f"{MARK} Mean over the finite windows only: some validation windows had no finite loss"
    " (val/nonfinite_frac above 0). It is biased low and not compared with others."
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading and format."""

    name: str
    note: str = ""
    """An explanation below the table; empty if the name is enough."""
    is_text: bool = False
    """Text is aligned left, numbers right."""
    may_wrap: bool = False
    """Whether a cell may take several lines."""

    @property
    def style(self) -> str:
        """CSS classes."""
        return " ".join(["text"] * self.is_text + ["wraps"] * self.may_wrap)


@dataclass(frozen=True)
class Cell:
    """The content of a cell."""

    text: str
    asides: tuple[str, ...] = ()
    """Lines in small print below the text: an interval, a remark."""
    link: str = ""
    """The target of a click on the text."""

    @property
    def plain(self) -> str:
        """The cell in one line."""
        return f"{self.text} ({'; '.join(self.asides)})" if self.asides else self.text


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its title names router and preset."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    remarks: Sequence[str] = ()
    is_grid: bool = False
    """Whether columns are to be compared with each other. A narrow screen then scrolls the table
    sideways; otherwise it shows each row as a card, so that no column is out of sight."""

    @property
    def notes(self) -> list[tuple[str, str]]:
        """The names and notes of the columns that have a note."""
        return [(column.name, column.note) for column in self.columns if column.note]

    @property
    def repeats(self) -> bool:
        """Whether some consecutive rows begin with the same cell."""
        firsts = [row[0] for row in self.rows]
        return any(one == two for one, two in pairwise(firsts))

    def only(self, names: Sequence[str]) -> "Table":
        """The table with only some of its columns."""
        picked = [i for i, column in enumerate(self.columns) if column.name in names]
        return Table(
            title=self.title,
            columns=[self.columns[i] for i in picked],
            rows=[[row[i] for i in picked] for row in self.rows],
            remarks=self.remarks,
            is_grid=self.is_grid,
        )

    def markdown(self, *, with_notes: bool = True) -> str:
        """The table as Markdown, with all text escaped."""
        heads = " | ".join(escape_markdown(column.name) for column in self.columns)
        rule = "|".join(":--" if column.is_text else "--:" for column in self.columns)
        lines = [f"**{escape_markdown(self.title)}**", "", f"| {heads} |", f"|{rule}|"]
        lines += [f"| {' | '.join(escape_markdown(c.plain) for c in row)} |" for row in self.rows]
        lines += [f"\n{escape_markdown(remark)}" for remark in self.remarks]
        if self.notes and with_notes:
            lines += [
                "",
                *(f"- *{escape_markdown(n)}*: {escape_markdown(t)}" for n, t in self.notes),
            ]
        return "\n".join(lines)

    def show(self) -> None:
        """Prints the table on the terminal, one line per row."""
        heads = [column.name for column in self.columns]
        terminal.table(self.title, heads, [[cell.text for cell in row] for row in self.rows])


def cell(text: str, *asides: str, link: str = "") -> Cell:
    """A cell with the asides that are not empty."""
    return Cell(text, tuple(aside for aside in asides if aside), link)


def arm_cell(row: Row) -> Cell:
    """The arm's label, its role, and when it acts."""
    asides = [row["role"] or ""]
    if row["trains_alike"]:
        asides.append("trains as its baseline does")
    elif row["acts_from"]:
        asides.append(f"acts after step {row['acts_from']:,.0f}")
    if row["censored_at"] is not None:
        asides.append(f"trains only to step {row['censored_at']:,.0f}")
    return cell(row["label"], *asides)


def mean_cell(row: Row, name: str, *, decimals: int, signed: bool = False) -> Cell:
    """A mean and its interval."""
    mean, low, high = (row[f"{name}_{end}"] for end in ("mean", "low", "high"))
    interval = number_format.between(low, high, decimals) if low != high else ""
    shown = number_format.signed if signed else number_format.fixed
    return cell(shown(mean, decimals), interval)


def difference_cell(row: Row, endpoint: str) -> Cell:
    """The difference from the baseline and its interval."""
    decimals = ENDPOINTS[endpoint][1]
    return mean_cell(row, f"{endpoint}_difference", decimals=decimals, signed=True)


def aa_range(row: Row, endpoint: str) -> str:
    """The range of the A/A control; empty if there is none."""
    low, high = (row[f"{endpoint}_null_{end}"] for end in ("low", "high"))
    return number_format.between(low, high, ENDPOINTS[endpoint][1])


def mark_remark(lines: Sequence[Sequence[Cell]]) -> list[str]:
    """The explanation of the mark, if any cell has it."""
    has_mark = any(MARK in each.plain for line in lines for each in line)
    return [MARK_REMARK] if has_mark else []


def link_to(file: Path, folder: Path) -> str:
    """A link from a folder to a file; empty if the file does not exist."""
    return quote(os.path.relpath(file, folder)) if file.is_file() else ""


def marked(text: str, *, nonfinite: bool) -> str:
    """The text of a loss, marked if validation windows were not finite."""
    return f"{text}{MARK}" if nonfinite else text


def setting(study: Study) -> str:
    """`ffn moe_writeup, preset crash`, for the titles of tables."""
    return ", ".join(
        f"{axis} {' and '.join(dict.fromkeys(run.axes[axis] for run in study.runs))}"
        for axis in ("ffn", "preset")
    )


def escape_markdown(text: str) -> str:
    """Escapes text: no HTML element, emphasis, table column or line break."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())
