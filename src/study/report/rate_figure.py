"""The figure of loss against learning rate: few families share a panel, many have one each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from src.study.analysis.rates import Family, final_loss
from src.study.report import svg
from src.study.report.figures import MARKERS, OTHER, RADIUS
from src.study.report.svg import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILLION,
    Drawing,
    Scale,
)

TITLE = "Final validation loss over learning rate, nats a token"

COLOURS = (BLUE, VERMILLION, ORANGE, PURPLE)
"""Of families in one panel; where there are more, names and points would lie on each other."""

COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The measures of a panel, in pixels."""

    width: float
    height: float
    left: float
    right: float
    """At whose left the last rate stands."""
    top: float
    bottom: float
    spread: float
    """Between the points of two runs of one rate."""
    radius: float
    """Of a point."""


WIDE = Frame(
    width=540.0,
    height=300.0,
    left=44.0,
    right=130.0,
    top=40.0,
    bottom=40.0,
    spread=5.0,
    radius=RADIUS,
)
SMALL = Frame(
    width=232.0, height=170.0, left=34.0, right=24.0, top=26.0, bottom=24.0, spread=3.0, radius=2.8
)


def drawing(found: Sequence[Family]) -> Drawing | None:
    """Final loss over learning rate: a point a run, a line a family; None without families.

    With many families each has a panel, and the first of them stands behind it in grey.
    """
    if not found:
        return None
    if len(found) <= len(COLOURS):
        return _shared(found)
    first = found[0]
    scales, rates = _scales(SMALL, found), _rates(found)
    panels = [_alone(family, first, *scales, rates=rates) for family in found]
    grid = svg.together(panels, columns=COLUMNS)
    title = f"{TITLE}; grey: {first.label}"
    body = svg.text(0, 15, title, size=13, bold=True)
    body += f'<g transform="translate(0 28)">{grid.body}</g>'
    return Drawing(width=grid.width, height=grid.height + 28, body=body, label=title)


def _shared(found: Sequence[Family]) -> Drawing:
    """All families in one panel, each named at its end."""
    x, y = _scales(WIDE, found)
    parts = [svg.text(0, 15, TITLE, size=13, bold=True), _axes(WIDE, x, y, _rates(found))]
    middle = (WIDE.left + WIDE.width - WIDE.right) / 2
    parts.append(
        svg.text(middle, WIDE.height - 5, "learning rate", size=11, anchor="middle", fill=MUTED)
    )
    for family, colour in zip(found, COLOURS, strict=False):
        parts.append(_line(family, x, y, colour=colour) + _points(family, WIDE, x, y))
        label = svg.fitted(family.label, WIDE.right - 22)
        last = family.rates[-1]
        at = x(math.log10(last)) + 18, y(family.mean_loss(last)) + 4
        parts.append(svg.text(*at, label, fill=INK))
    return Drawing(width=WIDE.width, height=WIDE.height, body="".join(parts), label=TITLE)


def _alone(family: Family, first: Family, x: Scale, y: Scale, *, rates: Sequence[float]) -> Drawing:
    """One family before the first, on the axes of all."""
    label = svg.fitted(family.label, SMALL.width - SMALL.left)
    parts = [svg.text(SMALL.left, 14, label, bold=True), _axes(SMALL, x, y, rates)]
    if family is not first:
        parts.append(_line(first, x, y, colour=GREY))
    parts.append(_line(family, x, y, colour=BLUE) + _points(family, SMALL, x, y))
    return Drawing(width=SMALL.width, height=SMALL.height, body="".join(parts), label=family.label)


def _rates(found: Sequence[Family]) -> list[float]:
    """Of all families, lowest first."""
    return sorted({rate for family in found for rate in family.rates})


def _scales(frame: Frame, found: Sequence[Family]) -> tuple[Scale, Scale]:
    """Of the logarithm of the rate, and of the loss."""
    rates = _rates(found)
    losses = [family.loss(run) for family in found for runs in family.runs.values() for run in runs]
    pad = 0.08 * (max(losses) - min(losses)) or 0.05
    x = Scale(
        low=math.log10(rates[0]),
        high=math.log10(rates[-1]),
        start=frame.left + 12,
        end=frame.width - frame.right,
    )
    y = Scale(
        low=min(losses) - pad,
        high=max(losses) + pad,
        start=frame.height - frame.bottom,
        end=frame.top,
    )
    return x, y


def _axes(frame: Frame, x: Scale, y: Scale, rates: Sequence[float]) -> str:
    right, base = frame.width - frame.right + 12, frame.height - frame.bottom
    parts = [svg.levels(y, frame.left, right, most=7 if frame is WIDE else 4, size=11)]
    for rate in rates:
        at = x(math.log10(rate))
        parts.append(svg.text(at, base + 18, f"{rate:g}", size=11, anchor="middle", fill=MUTED))
    parts.append(svg.line(frame.left, base, right, base, stroke=FAINT))
    return "".join(parts)


def _line(family: Family, x: Scale, y: Scale, *, colour: str) -> str:
    """Through the means."""
    means = [(x(math.log10(rate)), y(family.mean_loss(rate))) for rate in family.rates]
    return svg.polyline([means], stroke=colour, width=2)


def _points(family: Family, frame: Frame, x: Scale, y: Scale) -> str:
    """A point a run, beside each other at their rate."""
    parts = []
    for rate, runs in family.runs.items():
        for place, run in enumerate(runs):
            shape, fill, stroke, _ = MARKERS.get(run.outcome, OTHER)
            at = x(math.log10(rate)) + frame.spread * (place - (len(runs) - 1) / 2)
            loss = final_loss(run)
            said = "no finite loss" if loss is None else f"val/loss {loss:.3f}"
            hint = f"{run.name}: {said}, {len(run.nonfinite_steps)} non-finite batches"
            height = y(family.loss(run))
            parts.append(
                svg.marker(shape, at, height, frame.radius, fill=fill, stroke=stroke, hint=hint)
            )
    return "".join(parts)
