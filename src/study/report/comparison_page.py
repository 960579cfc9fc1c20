"""A page with an answer, a chart and tables, for comparisons beside the report of one study."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from src.common import terminal
from src.common.errors import InputError
from src.study.report.draw import TEMPLATES, DrawnChart, vega_script
from src.study.report.study_page import environment
from src.study.report.table import Table


def write_page(
    out: Path,
    *,
    name: str,
    answer: Sequence[str],
    chart: DrawnChart,
    caption: str,
    tables: Sequence[Table],
    arms: Iterable[Mapping[str, Any]],
) -> None:
    """Writes report.html and arms.csv, and prints the answer and the tables.

    Args:
        out: the folder.
        name: the heading.
        answer: sentences.
        chart: the chart below them.
        caption: the sentence below the chart.
        tables: those that have rows are shown.
        arms: the rows of arms.csv.

    Raises:
        InputError: the folder cannot be written.
    """
    filled = [table for table in tables if table.rows]
    page = (
        environment()
        .get_template("comparison.html")
        .render(
            name=name,
            answer=answer,
            chart=chart,
            caption=caption,
            tables=filled,
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            vega=vega_script(),
            script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        )
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page, encoding="utf-8")
        # Counts beside empty cells must not become fractions.
        pd.DataFrame(arms).convert_dtypes().to_csv(out / "arms.csv", index=False)
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    for line in answer:
        terminal.sentence(line)
    for table in filled:
        table.show()
    terminal.say(str(out / "report.html"))
