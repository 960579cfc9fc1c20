"""The charts of the book's pages, drawn from the results in the same folder."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from src.common.chart_library import altair as alt
from src.common.errors import InputError
from src.lab.book.page_words import Measures
from src.lab.book.single import SingleRun
from src.study.analysis.results import Analysis
from src.study.analysis.stats import wilson
from src.study.report.draw import BLUE, GREY, MUTED, VERMILLION, DrawnChart
from src.study.report.sections import CHARTS, Findings

FRONT_STUDY = "stability"
"""The main study; the project's front page shows its chart."""

FRONT_CHART = "figures/front.svg"
"""The path of that chart below experiments/."""

FRONT_ARMS = {
    "none": "as published",
    "clip03": "clip to 0.3",
    "warmdown": "LR warmdown",
    "noise": "gradient noise",
    "clip_value": "clip by value",
    "lower_lr": "0.3 of the LR",
    "router_eps": "epsilon in the router",
}
"""The arms that the front page shows, and their names there."""


def study_charts(measures: Measures, page: Path) -> Mapping[str, str]:
    """The SVG files that a study's page shows, by name.

    Raises:
        InputError: the page shows a chart that cannot be drawn from its results.
    """
    names = re.findall(r"\(figures/([\w-]+)\.svg\)", page.read_text(encoding="utf-8"))
    drawn = {}
    for name in names:
        chart = CHARTS[name](_findings(measures, measures.analysis)) if name in CHARTS else None
        if chart is None:
            raise InputError(f"{page}: shows figures/{name}.svg, which its results cannot give")
        drawn[f"{name}.svg"] = DrawnChart(chart).svg
    return drawn


def front_chart(measures: Measures) -> str:
    """The share of seeds that fail with each remedy, for a few arms under plain names."""
    rows = []
    for name, label in FRONT_ARMS.items():
        share = measures.one(name, scale=None).nonfinite
        low, high = wilson(share)
        rows.append(
            {
                "remedy": label,
                "share": share.events / share.total,
                "low": low,
                "high": high,
                "count": f"{share.events} of {share.total}",
            }
        )
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y(
            "remedy:N",
            sort=None,
            title=None,
            axis=alt.Axis(ticks=False, domain=False, labelPadding=12),
        )
    )
    shares = alt.X(
        "share:Q", title="seeds whose training goes non-finite, with 95 % interval",
        axis=alt.Axis(format=".0%", tickCount=5), scale=alt.Scale(domain=[0, 1]),
    )  # fmt: skip
    title = "Seeds that fail with each remedy"
    chart = alt.layer(
        base.mark_rule(color=GREY, strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_circle(color=VERMILLION, opacity=1, size=90).encode(x=shares),
        base.mark_text(align="left", fontSize=12).encode(x=alt.value(432), text="count:N"),
    ).properties(width=420, height=alt.Step(24), title=title, description=title)
    return DrawnChart(chart).svg


def _findings(measures: Measures, analysis: Analysis) -> Findings:
    study = measures.folder.study
    return Findings(study=study, analysis=analysis, folder=study.folder)


def run_chart(run: SingleRun) -> str:
    """Training loss of one large run, and the cumulative number of non-finite batches.

    A line marks the first non-finite batch.
    """
    curve = pd.DataFrame(run.curve, columns=["step", "loss", "nonfinite_batches"])
    first = run.first_nonfinite
    max_steps = run.recipe.max_steps
    # The high losses of the first 2 % of a run would flatten all others, so they are capped.
    usual = curve.loc[curve["step"] >= max_steps / 50, "loss"].max()
    x = alt.X(
        "step:Q", title="step", axis=alt.Axis(format=",d", grid=False),
        scale=alt.Scale(domain=[0, max_steps], nice=False),
    )  # fmt: skip
    curve = curve.assign(loss=curve["loss"].clip(upper=usual))
    base = alt.Chart(curve).encode(x=x)
    loss = base.mark_line(strokeWidth=1.8, color=BLUE).encode(
        y=alt.Y("loss:Q", title="nats per token", axis=alt.Axis(tickCount=5))
    )
    lost = base.mark_line(strokeWidth=1.8, color=VERMILLION).encode(
        y=alt.Y("nonfinite_batches:Q", title="batches", axis=alt.Axis(tickCount=4))
    )
    panels = {"Training loss": (loss, 170), "Non-finite batches so far": (lost, 90)}
    drawn = []
    for title, (line, height) in panels.items():
        layers = [line]
        if first is not None:
            at = alt.Chart(
                pd.DataFrame({"step": [first], "text": [f"first at step {first:,}"]})
            ).encode(x=x)
            layers.append(at.mark_rule(strokeDash=[3, 3], color=MUTED))
            layers.append(
                at.mark_text(align="right", dx=-6, color=MUTED).encode(
                    y=alt.value(10), text="text:N"
                )
            )
        drawn.append(alt.layer(*layers).properties(width=640, height=height, title=title))
    title = "Training loss and non-finite batches over the steps of one run"
    return DrawnChart(alt.vconcat(*drawn, description=title)).svg
