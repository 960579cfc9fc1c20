"""The table of the experts' load, layer by layer."""

from collections.abc import Sequence

from src.common import number_format
from src.study.analysis.expert_loads import LayerLoad, sampling_floor
from src.study.analysis.results import ArmResult
from src.study.read.collect import Study
from src.study.report.table import Cell, Column, Table


def load_table(
    arms: Sequence[tuple[ArmResult, list[LayerLoad]]], study: Study, *, title: str
) -> Table:
    """One row per layer of every arm."""
    rows = []
    for arm, loads in arms:
        floor = sampling_floor(study.of(arm.variant)[0])
        for load in loads:
            rows.append(
                [
                    Cell(arm.label),
                    Cell(str(load.layer)),
                    Cell(number_format.fixed(load.expected, 4)),
                    Cell(number_format.fixed(load.low)),
                    Cell(number_format.fixed(load.high)),
                    Cell(number_format.fixed(load.max_violation, 2)),
                    Cell(number_format.fixed(floor, 2)),
                    Cell(number_format.fixed(load.dead_experts, 1)),
                ]
            )
    return Table(
        title=title,
        is_grid=True,
        columns=(
            Column(name="arm", is_text=True),
            Column(name="layer"),
            Column(name="mean", note="mean load, always top_k / E"),
            Column(name="lowest", note="share of tokens that the least used expert receives"),
            Column(name="highest", note="share of tokens that the most used expert receives"),
            Column(name="MaxVio", note="(highest - mean) / mean"),
            Column(
                name="floor",
                note="MaxVio of a perfectly even router, because a batch is a finite sample",
            ),
            Column(name="unused", note="experts that no token of the batch is routed to"),
        ),
        rows=rows,
    )
