"""How evenly the experts of each layer are used at the end of a run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from src.study.analysis.results import Analysis, ArmResult
from src.study.read.collect import Run, Study

LAST_FRAC = 1 / 4
"""The part of the run, its last, over which loads are averaged."""


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """One layer of one arm: means over the logged steps of the last quarter, and over seeds."""

    layer: int
    expected: float
    """top_k / E."""
    low: float
    """Share of tokens that the least used expert sees."""
    high: float
    """Share of tokens that the most used expert sees."""
    max_violation: float
    dead_experts: float


def layer_loads(runs: Sequence[Run]) -> list[LayerLoad]:
    """Every layer that was logged; empty for models without experts."""
    values: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        last = max((line["step"] for line in run.lines), default=0)
        for line in run.lines:
            if line["step"] > (1 - LAST_FRAC) * last:
                for key, value in line.items():
                    found = re.fullmatch(r"moe/layer_(\d+)/(\w+)", key)
                    if found:
                        figures = values.setdefault(int(found[1]), {})
                        figures.setdefault(found[2], []).append(value)
    loads = []
    for layer, figures in sorted(values.items()):
        if {"load_min", "load_max", "max_violation"} <= set(figures):
            loads.append(
                LayerLoad(
                    layer=layer,
                    expected=fmean(figures["load_expected"])
                    if "load_expected" in figures
                    else _expected(runs[0]),
                    low=fmean(figures["load_min"]),
                    high=fmean(figures["load_max"]),
                    max_violation=fmean(figures["max_violation"]),
                    dead_experts=fmean(figures.get("dead_experts", [0.0])),
                )
            )
    return loads


def _expected(run: Run) -> float:
    ffn = run.config["ffn"]
    return float(ffn["top_k"]) / float(ffn["num_routed"])


def sampling_floor(run: Run) -> float | None:
    """MaxVio that a perfectly even router shows, because a batch is a sample."""
    ffn, recipe = run.config["ffn"], run.config["recipe"]
    if "num_routed" not in ffn or ffn["num_routed"] <= ffn["top_k"]:
        return None
    tokens = recipe["batch_size"] * recipe["seq_len"] * recipe["accumulate"]
    return 1.35 * math.sqrt((ffn["num_routed"] / ffn["top_k"] - 1) / tokens)


def all_loads(study: Study, analysis: Analysis) -> list[tuple[ArmResult, list[LayerLoad]]]:
    """Arms with experts, and their layers."""
    found = [(arm, layer_loads(study.of(arm.variant))) for arm in analysis.arms]
    return [(arm, loads) for arm, loads in found if loads]
