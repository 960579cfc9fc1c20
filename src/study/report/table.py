"""A table, and its forms: cells of a page, Markdown, the terminal."""

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
"""Of the frame of runs or of arms."""

MARK = "†"
"""Stands at every loss whose validation had windows without a finite loss."""

MARK_REMARK = (
    f"{MARK} The mean of the finite windows alone: some validation windows had no finite loss"
    " (val/nonfinite_frac above 0), so it flatters the run and compares with no other."
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column."""

    name: str
    note: str = ""
    """What it says, in one line beneath the table; empty where the head says it."""
    is_text: bool = False
    """Text stands left, numbers right."""
    may_wrap: bool = False
    """Sentences take several lines, names and figures one."""

    @property
    def style(self) -> str:
        """Its classes in a page."""
        return " ".join(["text"] * self.is_text + ["wraps"] * self.may_wrap)


@dataclass(frozen=True)
class Cell:
    """What stands in a field."""

    text: str
    asides: tuple[str, ...] = ()
    """Said more quietly beneath, a line each: an interval, a remark."""
    link: str = ""
    """Where a click leads."""

    @property
    def plain(self) -> str:
        """In one line."""
        return f"{self.text} ({'; '.join(self.asides)})" if self.asides else self.text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title that names router and preset."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    remarks: Sequence[str] = ()

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Columns that need a word, and the word."""
        return [(column.name, column.note) for column in self.columns if column.note]

    @property
    def repeats(self) -> bool:
        """Whether rows that follow each other begin with the same cell."""
        firsts = [row[0] for row in self.rows]
        return any(one == two for one, two in pairwise(firsts))

    def only(self, names: Sequence[str]) -> "Table":
        """The same with some of its columns."""
        picked = [i for i, column in enumerate(self.columns) if column.name in names]
        return Table(
            title=self.title,
            columns=[self.columns[i] for i in picked],
            rows=[[row[i] for i in picked] for row in self.rows],
            remarks=self.remarks,
        )

    def markdown(self) -> str:
        """As Markdown, with everything escaped that would be more than text there."""
        heads = " | ".join(escape_markdown(column.name) for column in self.columns)
        rule = "|".join(":--" if column.is_text else "--:" for column in self.columns)
        lines = [f"**{escape_markdown(self.title)}**", "", f"| {heads} |", f"|{rule}|"]
        lines += [f"| {' | '.join(escape_markdown(c.plain) for c in row)} |" for row in self.rows]
        lines += [f"\n{escape_markdown(remark)}" for remark in self.remarks]
        if self.notes:
            lines += [
                "",
                *(f"- *{escape_markdown(n)}*: {escape_markdown(t)}" for n, t in self.notes),
            ]
        return "\n".join(lines)

    def show(self) -> None:
        """On the terminal, in one line a row."""
        heads = [column.name for column in self.columns]
        terminal.table(self.title, heads, [[cell.text for cell in row] for row in self.rows])


def cell(text: str, *asides: str, link: str = "") -> Cell:
    """A cell with those of the asides that are not empty."""
    return Cell(text, tuple(aside for aside in asides if aside), link)


def arm_cell(row: Row) -> Cell:
    """The arm's label, its part in the study, and when it acts."""
    asides = [row["role"] or ""]
    if row["acts_from"]:
        asides.append(f"acts after step {row['acts_from']:,.0f}")
    if row["censored_at"] is not None:
        asides.append(f"trains to step {row['censored_at']:,.0f} only")
    return cell(row["label"], *asides)


def mean_cell(row: Row, name: str, *, decimals: int, signed: bool = False) -> Cell:
    """A mean and its interval."""
    mean, low, high = (row[f"{name}_{end}"] for end in ("mean", "low", "high"))
    interval = number_format.between(low, high, decimals) if low != high else ""
    shown = number_format.signed if signed else number_format.fixed
    return cell(shown(mean, decimals), interval)


def difference_cell(row: Row, endpoint: str) -> Cell:
    """The difference to the baseline and its interval."""
    decimals = ENDPOINTS[endpoint][1]
    return mean_cell(row, f"{endpoint}_difference", decimals=decimals, signed=True)


def null_range(row: Row, endpoint: str) -> str:
    """What chance alone gave; empty without a null arm."""
    low, high = (row[f"{endpoint}_null_{end}"] for end in ("low", "high"))
    return number_format.between(low, high, ENDPOINTS[endpoint][1])


def mark_remark(lines: Sequence[Sequence[Cell]]) -> list[str]:
    """The meaning of the mark, where any of the cells has it."""
    has_mark = any(MARK in each.plain for line in lines for each in line)
    return [MARK_REMARK] if has_mark else []


def link_to(file: Path, folder: Path) -> str:
    """The way from a report in a folder to a file; empty where there is none."""
    return quote(os.path.relpath(file, folder)) if file.is_file() else ""


def marked(text: str, *, nonfinite: bool) -> str:
    """The text of a loss, with the mark where it needs it."""
    return f"{text}{MARK}" if nonfinite else text


def setting(study: Study) -> str:
    """`ffn moe_writeup, preset crash`: what the title of every table names."""
    return ", ".join(
        f"{axis} {' and '.join(dict.fromkeys(run.axes[axis] for run in study.runs))}"
        for axis in ("ffn", "preset")
    )


def escape_markdown(text: str) -> str:
    """Text from outside as text: no element, no emphasis, no column, no line break."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())
