"""Fields of a row as cells. A row from a CSV file holds texts, and an empty one for none."""

from collections.abc import Mapping, Sequence

from src.common import number_format
from src.study.analysis.rows import ENDPOINTS, Value
from src.study.report.table import MARK, MARK_REMARK, Cell, cell

AnyRow = Mapping[str, Value]


def number(row: AnyRow, key: str) -> float | None:
    """A figure."""
    value = row[key]
    return None if value is None or value == "" else float(value)


def arm_cell(row: AnyRow) -> Cell:
    """The arm's label, its part in the study, and when it acts."""
    asides = [str(row["role"] or "")]
    begins, ends = number(row, "acts_from"), number(row, "censored_at")
    if begins:
        asides.append(f"acts after step {begins:,.0f}")
    if ends is not None:
        asides.append(f"trains to step {ends:,.0f} only")
    return cell(str(row["label"]), *asides)


def mean_cell(row: AnyRow, name: str, *, decimals: int) -> Cell:
    """A mean and its interval."""
    mean, low, high = (number(row, f"{name}_{end}") for end in ("mean", "low", "high"))
    interval = number_format.between(low, high, decimals) if low != high else ""
    return cell(number_format.fixed(mean, decimals), interval)


def difference_cell(row: AnyRow, endpoint: str) -> Cell:
    """The difference to the baseline and its interval."""
    decimals, name = ENDPOINTS[endpoint][1], f"{endpoint}_difference"
    mean, low, high = (number(row, f"{name}_{end}") for end in ("mean", "low", "high"))
    interval = number_format.between(low, high, decimals) if low != high else ""
    return cell(number_format.signed(mean, decimals), interval)


def null_range(row: AnyRow, endpoint: str) -> str:
    """What chance alone gave; empty without a null arm."""
    low, high = (number(row, f"{endpoint}_null_{end}") for end in ("low", "high"))
    return number_format.between(low, high, ENDPOINTS[endpoint][1])


def mark_remark(lines: Sequence[Sequence[Cell]]) -> list[str]:
    """The meaning of the mark, where any of the cells has it."""
    has_mark = any(MARK in each.plain for line in lines for each in line)
    return [MARK_REMARK] if has_mark else []
