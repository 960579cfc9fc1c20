"""The charts of reports and of the book, each made from a frame of chart_data."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from src.common.chart_library import altair as alt
from src.study.report.chart_data import OTHER, OUTCOMES
from src.study.report.draw import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    VERMILLION,
)

MARKERS = {
    "clean": ("circle", PAPER, BLUE),
    "intermittent": ("triangle-up", ORANGE, ORANGE),
    "collapsed": ("square", VERMILLION, VERMILLION),
    "stopped": ("diamond", PURPLE, PURPLE),
    "other": ("cross", MUTED, MUTED),
}
"""By outcome: shape, fill, outline. Outcomes differ in shape, not only in colour."""

STRIP_WIDTH, PANEL_WIDTH, PANEL_HEIGHT, TIMELINE_WIDTH = 430, 230, 150, 760

PANELS_IN_A_ROW = 4

ABOUT = ("arm", "seed", "outcome", "run")
"""Columns that tooltips show, besides the value."""

LINES = "split(datum.label, '\\n')"
"""Breaks a label where its text has a line break."""


def failures(
    points: pd.DataFrame, arms: pd.DataFrame, ends: Sequence[str]
) -> alt.LayerChart | alt.FacetChart:
    """Non-finite batches of every run; at the right of a row, the number of failing runs."""
    least, most = -0.4, max(10.0, points["value"].max()) * 1.1
    ticks = [0, *(k * 10**e for e in range(7) for k in (1, 3) if k * 10**e <= most)]
    x = alt.X(
        "value:Q",
        # Linear near 0, so that 0 can be shown; logarithmic beyond.
        scale=alt.Scale(type="symlog", constant=1, domain=[least, most], nice=False, clamp=True),
        axis=alt.Axis(values=ticks, format=",d"),
    )
    shown = [
        alt.Tooltip("value:Q", title="non-finite batches"),
        alt.Tooltip("of_baseline:N", title="baseline"),
    ]
    return _strips(
        points,
        _with_cuts(arms, least, most),
        ends,
        x=x,
        unit="non-finite batches after the arm begins to act",
        shown=shown,
        title="Non-finite batches of each seed",
        end_title="failing runs",
    )


def final_losses(
    points: pd.DataFrame, arms: pd.DataFrame, ends: Sequence[str], *, end_title: str
) -> alt.LayerChart | alt.FacetChart:
    """Final validation loss of every run; at the right of a row, the mean of the clean runs."""
    low, high = points["value"].min(), points["value"].max()
    # Intervals are shown whole unless they would crowd the points into a third of the chart.
    span = high - low
    low = max(low - span, np.nanmin([low, *arms["low"].astype(float)]))
    high = min(high + span, np.nanmax([high, *arms["high"].astype(float)]))
    pad = 0.08 * (high - low) or 0.05
    low, high = low - pad, high + pad
    x = alt.X(
        "value:Q",
        scale=alt.Scale(domain=[low, high], nice=False, clamp=True, zero=False),
        axis=alt.Axis(tickCount=6, format="~g"),
    )
    shown = [
        alt.Tooltip("value:Q", title="val/loss", format=".3f"),
        alt.Tooltip("nonfinite:Q", title="non-finite windows", format=".0%"),
    ]
    return _strips(
        points,
        _with_cuts(arms, low, high),
        ends,
        x=x,
        unit="nats per token",
        shown=shown,
        title="Final validation loss of each seed",
        end_title=end_title,
    )


def _with_cuts(arms: pd.DataFrame, least: float, most: float) -> pd.DataFrame:
    """The arms with the edges of the chart at which their intervals are cut; None: they are not."""
    return arms.assign(
        cut_low=[least if low < least else None for low in arms["low"].astype(float)],
        cut_high=[most if high > most else None for high in arms["high"].astype(float)],
    )


def _strips(
    points: pd.DataFrame,
    arms: pd.DataFrame,
    ends: Sequence[str],
    *,
    x: alt.X,
    unit: str,
    shown: Sequence[alt.Tooltip],
    title: str,
    end_title: str,
) -> Any:
    """One row per arm and a point per run; below the points, the mean and its interval."""
    points_height = min(8.0 * points["place"].nunique(), 64.0)
    height = max(40.0, points_height + 16, 14.0 * arms["row"].str.count("\n").max() + 22)
    y = alt.Y(
        "row:N",
        title=None,
        scale=alt.Scale(domain=list(arms["row"]), padding=0),
        axis=alt.Axis(
            labelExpr=LINES,
            labelLimit=260,
            tickBand="extent",
            grid=True,
            ticks=False,
            domain=False,
            labelPadding=8,
        ),
    )
    place = alt.YOffset("place:Q", scale=alt.Scale(domain=[0, 1]))
    beneath = alt.Chart(arms.assign(place=0.95, end=list(ends)))
    bars = beneath.mark_rule(color=GREY, strokeWidth=2, aria=False).encode(
        x=alt.X("low:Q", title=unit), x2="high:Q", y=y, yOffset=place
    )
    means = beneath.mark_tick(color=INK, thickness=2, height=8, orient="vertical", aria=False)
    said = beneath.mark_text(align="left", dx=8, fontSize=13, color=INK)
    head = alt.Chart(pd.DataFrame({"text": [end_title]})).mark_text(
        align="left", dx=8, dy=-10, fontSize=11, color=MUTED
    )
    layers: list[alt.Chart] = [
        bars,
        *(
            beneath.mark_point(shape=f"triangle-{side}", size=36, filled=True, color=GREY).encode(
                x=alt.X(f"{edge}:Q", title=unit), y=y, yOffset=place, opacity=alt.value(1)
            )
            for edge, side in (("cut_low", "left"), ("cut_high", "right"))
            if arms[edge].notna().any()
        ),
        means.encode(x=alt.X("mean:Q", title=unit), y=y, yOffset=place),
        said.encode(x=alt.value(STRIP_WIDTH), y=y, text="end:N"),
        head.encode(x=alt.value(STRIP_WIDTH), y=alt.value(0), text="text:N"),
    ]
    if points["baseline"].notna().any():
        strokes = alt.Chart(points[points["baseline"].notna()]).mark_tick(
            color=GREY, thickness=1.6, height=8, orient="vertical", aria=False
        )
        layers.append(strokes.encode(x=alt.X("baseline:Q", title=unit), y=y, yOffset=place))
    runs = _runs(alt.Chart(points), points, opacity=alt.Opacity("opacity:Q", scale=None))
    layers.append(
        runs.encode(
            x=x.title(unit), y=y, yOffset=place, tooltip=[*_about(*ABOUT[:2]), *shown, *ABOUT[2:]]
        )
    )
    return alt.layer(
        *layers,
        width=STRIP_WIDTH,
        height=height * len(arms),
        title=title,
        description=f"{title}, by arm",
    )


def _runs(
    chart: alt.Chart, runs: pd.DataFrame, *, opacity: Any = None, size: int = 60
) -> alt.Chart:
    """A point per run, marked by its outcome; a click on the legend selects an outcome."""
    words = {**OUTCOMES, "other": OTHER}
    there = [name for name in MARKERS if (runs["outcome"] == words[name]).any()]
    picked = alt.selection_point(name="outcome", fields=["outcome"], bind="legend")
    legend = alt.Legend(title=None, symbolOpacity=1)

    def scale(part: int) -> alt.Scale:
        return alt.Scale(
            domain=[words[name] for name in there], range=[MARKERS[name][part] for name in there]
        )

    return (
        chart.mark_point(size=size, strokeWidth=1.4)
        .encode(
            shape=alt.Shape("outcome:N", scale=scale(0), legend=legend),
            fill=alt.Fill("outcome:N", scale=scale(1), legend=legend),
            stroke=alt.Stroke("outcome:N", scale=scale(2), legend=legend),
            opacity=alt.condition(picked, opacity or alt.value(1), alt.value(0.08)),
            **_links(runs),
        )
        .add_params(picked)
    )


def _links(runs: pd.DataFrame) -> dict[str, Any]:
    """A click opens the run's folder, if it has one."""
    return {"href": alt.Href("link:N")} if runs["link"].notna().any() else {}


def _about(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:N") for name in names]


def learning_rates(points: pd.DataFrame) -> alt.FacetChart:
    """Final loss over learning rate: a panel per family, with the first family in grey."""
    rates = sorted(set(points.loc[points["part"] == "mean", "rate"]))
    x = alt.X(
        "rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", domain=[rates[0] / 1.5, rates[-1] * 1.5], nice=False),
        axis=alt.Axis(values=rates, format="~g", grid=False, labelOverlap=True, labelSeparation=8),
    )
    y = alt.Y(
        "loss:Q",
        title="val/loss",
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    base = alt.Chart()
    line = base.mark_line(strokeWidth=2, aria=False).encode(x=x, y=y)
    own = points[points["part"] == "run"]
    said = alt.Tooltip("said:N", title="val/loss")
    rate = alt.Tooltip("at:N", title="learning rate")
    layers = [
        _part(line.encode(color=alt.value(GREY)), "first"),
        _part(line.encode(color=alt.value(BLUE)), "mean"),
        _part(_runs(base, own, size=36), "run").encode(
            x=x, y=y, tooltip=[*_about(*ABOUT[:2]), rate, said, *_about(*ABOUT[2:])]
        ),
    ]
    title = "Final validation loss over learning rate, nats per token"
    first = points["panel"].iloc[0].replace("\n", "")
    grey = f"grey: {first}" if (points["part"] == "first").any() else ""
    return _panels(layers, points, title=title, subtitle=grey)


def _part(chart: alt.Chart, name: str) -> alt.Chart:
    return chart.transform_filter(f"datum.part == '{name}'")


def _panels(
    layers: Sequence[alt.Chart],
    data: pd.DataFrame,
    *,
    title: str,
    subtitle: str = "",
    height: float = PANEL_HEIGHT,
) -> alt.FacetChart:
    """Small charts with equal axes, one for each value of the column `panel`."""
    names = list(dict.fromkeys(data["panel"]))
    # Balances the rows: five panels in four columns would leave the last row almost empty.
    rows = math.ceil(len(names) / PANELS_IN_A_ROW)
    size = 1.0 if len(names) > 2 else 1.8
    return (
        alt.layer(*layers, data=data, width=PANEL_WIDTH * size, height=height * size)
        .facet(
            facet=alt.Facet("panel:N", title=None, sort=names, header=_header()),
            columns=math.ceil(len(names) / rows),
            title=alt.Title(title, subtitle=subtitle),
            description=f"{title}, by arm",
        )
        .resolve_axis(x="independent", y="independent")
    )


def _header() -> alt.Header:
    return alt.Header(
        labelExpr=LINES, labelAnchor="start", labelFontSize=12, labelColor=INK, labelPadding=6
    )


def loss_curves(curves: pd.DataFrame) -> alt.FacetChart:
    """Validation loss over the run: a panel per arm, a thin line per run, baselines in grey."""
    colour = alt.Color(
        "side:N",
        scale=alt.Scale(domain=["arm", "baseline"], range=[BLUE, GREY]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
    )
    picked = alt.selection_point(name="side", fields=["side"], bind="legend")
    x = alt.X(
        "step:Q", title="step", axis=alt.Axis(tickCount=4, format=",d", grid=False),
        scale=alt.Scale(nice=False, zero=True),
    )  # fmt: skip
    y = alt.Y(
        "loss:Q", title="nats per token", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)
    )
    base = alt.Chart().encode(x=x, y=y)
    span = base.encode(color=colour, detail="side:N")
    line = base.encode(color=colour, detail="line:Q", **_links(curves))
    layers = [
        _part(span.mark_area(opacity=0.18, aria=False), "span").encode(
            y="least:Q", y2="greatest:Q"
        ),
        _part(line.mark_line(strokeWidth=0.9, aria=False), "run").encode(
            opacity=alt.condition(picked, alt.value(0.65), alt.value(0.05)),
            tooltip=_about(*ABOUT),
        ),
        _part(span.mark_line(strokeWidth=2.2, aria=False), "span"),
        _part(alt.Chart().mark_rule(strokeDash=[2, 3], color=MUTED), "start").encode(x=x),
        _part(base.mark_point(shape="M-1,-1L1,1M-1,1L1,-1", size=9, aria=False), "run")
        .transform_filter("datum.nonfinite > 0 && datum.loss != null")
        .encode(
            color=alt.value(VERMILLION),
            tooltip=[
                *_about(*ABOUT[:2]),
                "step:Q",
                alt.Tooltip("nonfinite:Q", title="non-finite windows", format=".0%"),
                *_about(*ABOUT[2:]),
            ],
        ),
    ]
    layers[1] = layers[1].add_params(picked)
    title = "Validation loss over the run, nats per token"
    return _panels(layers, curves, title=title)


def timeline(spans: pd.DataFrame) -> alt.FacetChart:
    """Spikes and non-finite steps over time: a line per run, grouped by arm."""
    y = alt.Y(
        "seed:N",
        title=None,
        sort=None,
        axis=alt.Axis(labelExpr="'seed ' + datum.label", ticks=False, domain=False, grid=False),
    )
    x = alt.X(
        "start:Q", title="step", axis=alt.Axis(tickCount=8, format=",d"),
        scale=alt.Scale(domain=[0, spans["end"].max()], nice=False),
    )  # fmt: skip
    base = alt.Chart().encode(x=x, y=y, **_links(spans))
    about = [*_about(*ABOUT), alt.Tooltip("note:N", title="steps")]
    steps = [alt.Tooltip("start:Q", title="step", format=",d"), *_about(*ABOUT)]
    layers = [
        _part(base.mark_rule(color=GREY, strokeWidth=1.5), "run").encode(x2="end", tooltip=about),
        _part(base.mark_tick(color=INK, thickness=1.4, height=8), "run").encode(x="end:Q"),
        _part(base.mark_bar(color=VERMILLION, height=10, aria=False), "nonfinite").encode(
            x2="end", tooltip=steps
        ),
        _part(
            base.mark_point(shape="triangle-down", size=22, filled=True, color=BLUE, yOffset=-4),
            "spike",
        ).encode(tooltip=steps, opacity=alt.value(1)),
        _part(alt.Chart().mark_text(align="left", dx=10, fontSize=11, color=MUTED), "run").encode(
            x=alt.value(TIMELINE_WIDTH), y=y, text="note:N"
        ),
        _part(alt.Chart().mark_rule(strokeDash=[2, 3], color=MUTED), "start").encode(x=x),
    ]
    title = "Spikes and non-finite steps of every run"
    return (
        alt.layer(*layers, data=spans, width=TIMELINE_WIDTH, height=alt.Step(14))
        .facet(
            facet=alt.Facet(
                "panel:N", title=None, sort=list(dict.fromkeys(spans["panel"])), header=_header()
            ),
            columns=1,
            spacing=4,
            title=title,
            description=title,
        )
        .resolve_scale(y="independent")
    )


def router_loads(layers: pd.DataFrame) -> alt.FacetChart:
    """How evenly experts are used: for each layer, from the least to the most used expert."""
    x = alt.X(
        "layer:O",
        title="layer",
        scale=alt.Scale(paddingInner=0.4, paddingOuter=0.3),
        axis=alt.Axis(labelAngle=0, labelOverlap=True, grid=False),
    )
    y = alt.Y(
        "low:Q", title="share of tokens", axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=True)
    )
    shown = [
        *_about("arm", "layer"),
        alt.Tooltip("low:Q", title="least used", format=".3f"),
        alt.Tooltip("high:Q", title="most used", format=".3f"),
        alt.Tooltip("max_violation:Q", title="MaxVio", format=".2f"),
        alt.Tooltip("dead_experts:Q", title="unused experts", format=".1f"),
    ]
    base = alt.Chart().encode(x=x)
    bars = base.mark_bar(color=BLUE, opacity=0.8).encode(y=y, y2="high", tooltip=shown)
    mean = base.mark_tick(color=INK, thickness=1.6).encode(y="expected:Q")
    title = "Load of the experts, by layer"
    return _panels([bars, mean], layers, title=title, height=110)
