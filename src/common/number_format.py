"""Figures as text for people: fixed decimals a column, a true minus, a dash for none."""

import math
import re
from collections.abc import Sequence

NONE = "\N{EN DASH}"
"""Stands where there is no figure."""

MINUS, INFINITY = "\N{MINUS SIGN}", "\N{INFINITY}"

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, decimals: int = 3) -> str:
    """With so many decimals, and commas between thousands."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return MINUS + INFINITY if value < 0 else INFINITY
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and text.strip("0.,") != ""
    return MINUS + text if negative else text


def signed(value: float | None, decimals: int = 3) -> str:
    """The same with a plus where it is above 0."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def between(low: float | None, high: float | None, decimals: int = 3) -> str:
    """`2.150 to 2.192`, or one figure where both ends are; empty where an end is not known."""
    if low is None or high is None:
        return ""
    ends = fixed(low, decimals), fixed(high, decimals)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def p_value(value: float | None) -> str:
    """Three decimals, and no 0."""
    if value is None:
        return NONE
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def compact(value: float | None, unit: str = "") -> str:
    """`66.6 k`, with the unit behind it."""
    if value is None or not math.isfinite(value):
        return NONE
    scale, prefix = next(((s, p) for s, p in UNITS if abs(value) >= s), (1.0, ""))
    number = f"{value / scale:.3g}"
    # 999.6 k has three digits as 1e+03 only.
    number = f"{value / scale:.0f}" if "e" in number else number
    return f"{number} {prefix}{unit}".strip()


def steps(numbers: Sequence[int]) -> str:
    """`70, 82, 90`, or the first and the last of many."""
    if not numbers:
        return NONE
    ordered = sorted(numbers)
    if len(ordered) <= 3:
        return ", ".join(f"{number:,}" for number in ordered)
    return f"{ordered[0]:,} to {ordered[-1]:,}"


def metric_safe(name: str) -> str:
    """With the letters that MLflow takes in the name of a metric."""
    return re.sub(r"[^A-Za-z0-9_. /-]", "_", name)
