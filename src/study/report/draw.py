"""Renders a chart in three forms: part of the report's page, SVG file, PNG file."""

import html
import json
import re
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

import vl_convert
from markupsafe import Markup

from src.common.chart_library import altair as alt

INK, MUTED, GREY, RULE, PAPER = "#222222", "#5f6368", "#9aa0a6", "#d5d7da", "#ffffff"
BLUE, ORANGE, VERMILLION, PURPLE = "#0072b2", "#e69f00", "#d55e00", "#cc79a7"
"""From the colour-blind safe palette of Okabe and Ito."""

PAGE_COLOURS = {
    INK: "ink",
    MUTED: "muted",
    GREY: "grey",
    RULE: "rule",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    VERMILLION: "vermillion",
    PURPLE: "purple",
}
"""In a page every colour is a CSS variable, so that charts follow the light and dark themes."""

PNG_SCALE = 1.5

TEMPLATES = Path(__file__).parent / "templates"

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
"""Charts are laid out with the first font; the second has the same letter widths."""

# Altair refuses more than 5,000 rows, to keep notebooks small; curves of large studies have more.
alt.data_transformers.disable_max_rows()

_ATTRIBUTES = re.compile(r' (?:class|role|aria-[a-z]+|pointer-events)="[^"]*"')
_LINKS = re.compile(r"<a [^>]*>|</a>")
_UNSEEN = re.compile(r'<path d="" display="none"/>|<path d="M0,0h0v0h0Z"/>')
_DIGITS = re.compile(r"-?\d+\.\d{2,}(?:e-\d+)?")


@alt.theme.register("report", enable=True)
def theme() -> alt.theme.ThemeConfig:
    """The style of all charts: fonts, colours, legend at the top."""
    return {
        "background": PAPER,
        "config": {
            "font": FONT,
            # More at the right, for browsers with wider letters.
            "padding": {"left": 6, "right": 16, "top": 6, "bottom": 6},
            "view": {"stroke": None},
            "axis": {
                "labelColor": MUTED,
                "titleColor": MUTED,
                "titleFontWeight": "normal",
                "labelFontSize": 12,
                "titleFontSize": 12,
                "domainColor": RULE,
                "gridColor": RULE,
                "tickColor": RULE,
            },
            "axisX": {"labelFlush": False},
            "axisY": {"labelColor": INK},
            "title": {
                "anchor": "start",
                "offset": 10,
                "color": INK,
                "fontSize": 14,
                "subtitleColor": MUTED,
                "subtitleFontSize": 12,
            },
            "legend": {
                "orient": "top",
                "labelColor": INK,
                "labelFontSize": 12,
                "labelLimit": 300,
                "symbolSize": 80,
            },
            "text": {"color": INK},
        },
    }


@lru_cache
def vega_script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script, for a page that loads nothing."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside a string of the bundle this would end the page's script element.
    return Markup(bundle.replace("</script", "<\\/script"))


class DrawnChart:
    """A rendered chart.

    Args:
        chart: an altair chart. Its description is the alternative text.
    """

    def __init__(self, chart: Any) -> None:
        # Tests validate the charts against the schema; that takes longer than drawing them.
        self.spec = chart.to_dict(validate=False)
        self.svg = self._draw(self.spec)

    def _draw(self, spec: dict[str, Any]) -> str:
        return _smaller(vl_convert.vegalite_to_svg(spec), str(self.spec["description"]))

    def save(self, folder: Path, name: str) -> None:
        """Writes NAME.svg and NAME.png."""
        (folder / f"{name}.svg").write_text(self.svg, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(vl_convert.svg_to_png(self.svg, scale=PNG_SCALE))

    def figure(self, *, titled: bool = True) -> Markup:
        """HTML: the static drawing, and the specification for the interactive one.

        Args:
            titled: whether to keep the title; False below a heading that says the same.
        """
        shown, drawing = self.spec, self.svg
        if not titled:
            subtitle = shown["title"].get("subtitle") if isinstance(shown["title"], dict) else ""
            shown = {key: value for key, value in shown.items() if key != "title"}
            shown |= {"title": {"text": "", "subtitle": subtitle}} if subtitle else {}
            drawing = self._draw(shown)
        # Escaped, so that no HTML element can begin or end inside the script's text.
        spec = _page_colours(json.dumps(shown)).replace("<", "\\u003c")
        svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", _page_colours(drawing))
        return Markup(
            f'<figure class="chart"><div>{svg}</div>'
            f'<script type="application/json">{spec}</script></figure>'
        )

    def interactive(self) -> str:
        """HTML for notebooks: the static drawing, which a script replaces by the interactive one.

        The notebook must show `vega_script()` before.
        """
        name = f"chart-{uuid.uuid4().hex}"
        spec = json.dumps(self.spec).replace("<", "\\u003c")
        options = '{renderer: "svg", actions: false}'
        script = f'vegaEmbed(document.getElementById("{name}"), {spec}, {options});'
        return f'<div id="{name}">{self.svg}</div><script>{script}</script>'


def _page_colours(text: str) -> str:
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(f'"{colour}"', f'"var(--{name})"')
    return text


def _smaller(svg: str, description: str) -> str:
    """A smaller drawing: attributes for scripts removed, numbers rounded to 0.01 pixels.

    Links are removed as well, because they are relative to the page and not to the SVG file.
    """
    svg = _ATTRIBUTES.sub("", _LINKS.sub("", svg))
    svg = re.sub(r"<[^>]+>", lambda tag: _DIGITS.sub(_rounded, tag[0]), svg)
    label = html.escape(description)
    return _UNSEEN.sub("", svg).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1) + "\n"


def _rounded(digits: re.Match[str]) -> str:
    return f"{round(float(digits[0]), 2):g}" if abs(float(digits[0])) < 10_000 else digits[0]
