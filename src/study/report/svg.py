"""Drawing in SVG by hand: text stays sharp, no script is needed, and 200 runs cost no time.

Coordinates are pixels at full width. Text that comes from outside is escaped by `text` and `title`.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

INK, MUTED, GREY, FAINT, SHADE = "#222222", "#5f6368", "#9aa0a6", "#d5d7da", "#f4f4f1"
BLUE, ORANGE, VERMILLION, PURPLE = "#0072b2", "#e69f00", "#d55e00", "#cc79a7"
"""Of Okabe and Ito, whose eight colours all forms of colour-blindness can tell apart."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A finished drawing."""

    width: float
    height: float
    body: str
    label: str
    """What it shows, for those who cannot see it."""

    def svg(self, *, standalone: bool = False) -> str:
        """As an element of a page, or as a file of its own."""
        space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
        back = rect(0, 0, self.width, self.height, fill="#ffffff") if standalone else ""
        return (
            f'<svg{space} viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}"'
            f' height="{self.height:g}" role="img" aria-label="{html.escape(self.label)}"'
            f' font-family="{FONT}">{back}{self.body}</svg>'
        )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to coordinates; values outside are drawn on the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    """Logarithm of 1 + value, so that 0 has a place."""

    def __call__(self, value: float) -> float:
        """The coordinate, to a tenth of a pixel."""
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    def _of(self, value: float) -> float:
        return math.log1p(max(value, 0.0)) if self.log else value

    def ticks(self, most: int) -> list[float]:
        """Round values within, at most so many."""
        if self.log:
            decades = [float(k * 10**e) for e in range(7) for k in (1, 3)]
            values = [0.0, *(value for value in decades if value <= self.high)]
            return values if len(values) <= most else [0.0, *values[1::2]]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / max(1, most - 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(step * number, 10) for number in range(first, last + 1)]


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: float = 12,
    anchor: str = "start",
    fill: str = INK,
    bold: bool = False,
) -> str:
    """One line of text; (x, y) is on its base line."""
    weight = ' font-weight="600"' if bold else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{side}{weight}>'
        f"{html.escape(content)}</text>"
    )


def fitted(content: str, width: float, *, size: float = 12) -> str:
    """The text, cut in its middle where it is wider than that."""
    most = max(6, int(width / (0.62 * size)))
    if len(content) <= most:
        return content
    head = (most - 1) * 2 // 3
    return f"{content[:head]}…{content[len(content) - (most - 1 - head) :]}"


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    stroke: str = FAINT,
    width: float = 1,
    dash: str = "",
) -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}"'
        f' stroke-width="{width:g}"{dashes}/>'
    )


def rect(x: float, y: float, width: float, height: float, *, fill: str, opacity: float = 1) -> str:
    """A filled rectangle."""
    see = "" if opacity == 1 else f' opacity="{opacity:g}"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{max(height, 0):g}"'
        f' fill="{fill}"{see}/>'
    )


def polyline(
    pieces: Sequence[Sequence[tuple[float, float]]],
    *,
    stroke: str,
    width: float = 1,
    opacity: float = 1,
) -> str:
    """A line with gaps: a piece of one point alone is a dot."""
    drawn = []
    for piece in pieces:
        if piece:
            first, *rest = piece
            points = rest or [(first[0] + 0.1, first[1])]
            drawn.append(
                f"M{first[0]:g} {first[1]:g}L" + " ".join(f"{x:g} {y:g}" for x, y in points)
            )
    see = "" if opacity == 1 else f' opacity="{opacity:g}"'
    return (
        f'<path d="{"".join(drawn)}" fill="none" stroke="{stroke}" stroke-width="{width:g}"'
        f' stroke-linejoin="round" stroke-linecap="round"{see}/>'
        if drawn
        else ""
    )


def area(
    upper: Sequence[tuple[float, float]],
    lower: Sequence[tuple[float, float]],
    *,
    fill: str,
    opacity: float,
) -> str:
    """A band between two lines over the same x."""
    points = " ".join(f"{x:g},{y:g}" for x, y in (*upper, *reversed(lower)))
    return f'<polygon points="{points}" fill="{fill}" opacity="{opacity:g}"/>'


def marker(shape: str, x: float, y: float, r: float, *, fill: str, stroke: str, hint: str) -> str:
    """A point: circle, triangle, square, diamond or cross; the hint shows under the mouse."""
    style = f'fill="{fill}" stroke="{stroke}" stroke-width="1.3"'
    inside = f"<title>{html.escape(hint)}</title>" if hint else ""
    if shape == "circle":
        return f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" {style}>{inside}</circle>'
    paths = {
        "triangle": f"M{x:g} {y - r:g}l{r:g} {1.8 * r:g}h{-2 * r:g}z",
        "square": f"M{x - 0.9 * r:g} {y - 0.9 * r:g}h{1.8 * r:g}v{1.8 * r:g}h{-1.8 * r:g}z",
        "diamond": f"M{x:g} {y - 1.2 * r:g}l{1.2 * r:g} {1.2 * r:g}l{-1.2 * r:g} {1.2 * r:g}"
        f"l{-1.2 * r:g} {-1.2 * r:g}z",
        "cross": f"M{x - r:g} {y - r:g}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}",
    }
    return f'<path d="{paths[shape]}" {style}>{inside}</path>'


def levels(y: Scale, left: float, right: float, *, most: int, size: float) -> str:
    """Lines across a panel at round values, at most so many, each with its value at the left."""
    return "".join(
        line(left, y(tick), right, y(tick))
        + text(left - 5, y(tick) + 3.5, f"{tick:g}", size=size, anchor="end", fill=MUTED)
        for tick in y.ticks(most)
    )


def together(drawings: Sequence[Drawing], *, columns: int, gap: float = 16) -> Drawing:
    """Several drawings of one size in a grid."""
    width = max(drawing.width for drawing in drawings)
    height = max(drawing.height for drawing in drawings)
    body = "".join(
        f'<g transform="translate({(width + gap) * (index % columns):g}'
        f' {(height + gap) * (index // columns):g})">{drawing.body}</g>'
        for index, drawing in enumerate(drawings)
    )
    used = min(columns, len(drawings))
    rows = -(-len(drawings) // columns)
    return Drawing(
        width=used * (width + gap) - gap,
        height=rows * (height + gap) - gap,
        body=body,
        label="; ".join(drawing.label for drawing in drawings),
    )
