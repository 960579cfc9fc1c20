"""Numbers as text for people: fixed decimals, a true minus sign, a dash for a missing value."""

import math
import re
from collections.abc import Sequence

NONE = "\N{EN DASH}"
"""Shown in place of a missing value."""

MINUS, INFINITY = "\N{MINUS SIGN}", "\N{INFINITY}"

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, decimals: int = 3) -> str:
    """The value with fixed decimals and a comma between thousands."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return MINUS + INFINITY if value < 0 else INFINITY
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and text.strip("0.,") != ""
    return MINUS + text if negative else text


def signed(value: float | None, decimals: int = 3) -> str:
    """As `fixed`, with a plus sign if the value is above 0."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def between(low: float | None, high: float | None, decimals: int = 3) -> str:
    """`2.150 to 2.192`, or one number if both ends print alike; empty if an end is None."""
    if low is None or high is None:
        return ""
    ends = fixed(low, decimals), fixed(high, decimals)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def p_value(value: float | None) -> str:
    """Three decimals; `<0.001` instead of 0."""
    if value is None:
        return NONE
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def p_equals(value: float | None) -> str:
    """`= 0.012` or `< 0.001`, to stand after a p."""
    text = p_value(value)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def compact(value: float | None, unit: str = "") -> str:
    """Three significant digits with an SI prefix and the unit, such as `66.6 kB`."""
    if value is None or not math.isfinite(value):
        return NONE
    scale, prefix = next(((s, p) for s, p in UNITS if abs(value) >= s), (1.0, ""))
    number = f"{value / scale:.3g}"
    # With three digits, 999.6 would be formatted as 1e+03.
    number = f"{value / scale:.0f}" if "e" in number else number
    return f"{number} {prefix}{unit}".strip()


def steps(numbers: Sequence[int]) -> str:
    """`70, 82, 90`, or the first and the last if there are more than three; equal ones once."""
    if not numbers:
        return NONE
    ordered = sorted(numbers)
    if len(ordered) > 3 and ordered[0] != ordered[-1]:
        return f"{ordered[0]:,} to {ordered[-1]:,}"
    return ", ".join(f"{number:,}" for number in dict.fromkeys(ordered))


def metric_safe(name: str) -> str:
    """The name with every character that MLflow does not accept in a metric replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_. /-]", "_", name)
