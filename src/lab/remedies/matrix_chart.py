"""The matrix of remedies and failures as a chart."""

import pandas as pd

from src.common.chart_library import altair as alt
from src.lab.book.page_words import Measures
from src.lab.book.select_arms import UndecidedError
from src.study.report.draw import BLUE, VERMILLION, DrawnChart

STUDY = "remedies"
"""The study that the chart shows."""

CHART = "figures/remedies.svg"
"""Its path below experiments/."""

ROW, COLUMN = 20, 92
"""Height and width of a cell in pixels."""


def matrix_chart(measures: Measures) -> str:
    """The share of each failure's damage that each remedy undoes, as an SVG file.

    A coloured cell is a significant effect: blue undoes damage, red adds some. The colour scale is
    clipped at 100 % either way.
    """
    failures = measures.failures()
    rows = []
    for remedy in measures.remedies():
        for failure in failures:
            try:
                effect = measures.effect(failure, remedy)
            except UndecidedError:
                continue
            rows.append(
                {
                    "remedy": remedy,
                    "failure": failure.replace("_", " "),
                    "shade": max(-1.0, min(1.0, effect.undone)) if effect.is_significant else 0.0,
                    "text": f"{measures.cell(failure, remedy).strip('*')}",
                    "weight": "bold" if effect.is_significant else "normal",
                    "is_dark": effect.is_significant and abs(effect.undone) > 0.6,
                }
            )
    names = [failure.replace("_", " ") for failure in failures]
    axis = alt.Axis(
        orient="top", labelAngle=0, labelLimit=COLUMN, labelExpr="split(datum.label, ' ')",
        ticks=False, domain=False, title=None, labelPadding=20,
    )  # fmt: skip
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("failure:N", sort=names, axis=axis),
        y=alt.Y(
            "remedy:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False)
        ),
    )  # fmt: skip
    colours = alt.Scale(domain=[-1, 0, 1], range=[VERMILLION, "#f4f4f4", BLUE])
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color("shade:Q", scale=colours, legend=None)
    )
    texts = [
        base.transform_filter(alt.datum.weight == weight)
        .mark_text(fontSize=11, fontWeight=weight)
        .encode(
            text="text:N",
            color=alt.condition(alt.datum.is_dark, alt.value("white"), alt.value("#333333")),
        )
        for weight in ("normal", "bold")
    ]
    title = "Share of a failure's damage that a remedy undoes (coloured: significant)"
    chart = alt.layer(cells, *texts).properties(
        width=COLUMN * len(names), height=alt.Step(ROW), title=title, description=title
    )
    return DrawnChart(chart).svg
