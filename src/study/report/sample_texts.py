"""Text samples of a study's models: one per arm, with a link to the others."""

from pathlib import Path

from src.generation.samples import first_sample
from src.study.analysis.results import Analysis
from src.study.read.collect import Run, Study
from src.study.report.table import Cell, Column, Table, cell, link_to

FILE = "samples.md"


def samples_table(study: Study, analysis: Analysis, *, title: str, folder: Path) -> Table:
    """The first sample of the first seed of each arm that has one.

    Args:
        study: the study.
        analysis: has the arms in their order.
        title: the table's title.
        folder: the report's folder, to which links are relative.
    """
    rows = []
    for arm in analysis.arms:
        run = next((run for run in study.of(arm.variant) if (run.folder / FILE).is_file()), None)
        if run is not None:
            seed = cell(str(run.seed), link=link_to(run.folder / FILE, folder))
            rows.append([Cell(arm.label), seed, Cell(_text(run))])
    return Table(
        title=title,
        columns=[
            Column(name="arm", is_text=True),
            Column(name="seed", note="links to all samples of the run"),
            Column(
                name="text",
                note="continuation of the write-up's first prompt; a slash marks a line break",
                is_text=True,
                may_wrap=True,
            ),
        ],
        rows=rows,
    )


def _text(run: Run) -> str:
    text = first_sample((run.folder / FILE).read_text(encoding="utf-8", errors="replace"))
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())
