"""How evenly each layer's experts are used at the end of a run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from src.study.analysis.results import Analysis, ArmResult
from src.study.read.collect import Run, Study

LAST_FRAC = 1 / 4
"""Loads are averaged over this last part of the run."""


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """One layer of one arm: means over the logged steps of the last quarter and over the seeds."""

    layer: int
    expected: float
    """top_k / E."""
    low: float
    """Share of tokens that the least used expert receives."""
    high: float
    """Share of tokens that the most used expert receives."""
    max_violation: float
    dead_experts: float


def layer_loads(runs: Sequence[Run]) -> list[LayerLoad]:
    """The logged layers; empty for models without experts."""
    values: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        last = max((line["step"] for line in run.lines), default=0)
        for line in run.lines:
            if line["step"] > (1 - LAST_FRAC) * last:
                for key, value in line.items():
                    found = re.fullmatch(r"moe/layer_(\d+)/(\w+)", key)
                    if found:
                        metrics = values.setdefault(int(found[1]), {})
                        metrics.setdefault(found[2], []).append(value)
    loads = []
    for layer, metrics in sorted(values.items()):
        if {"load_min", "load_max", "max_violation"} <= set(metrics):
            loads.append(
                LayerLoad(
                    layer=layer,
                    expected=fmean(metrics["load_expected"])
                    if "load_expected" in metrics
                    else _expected(runs[0]),
                    low=fmean(metrics["load_min"]),
                    high=fmean(metrics["load_max"]),
                    max_violation=fmean(metrics["max_violation"]),
                    dead_experts=fmean(metrics.get("dead_experts", [0.0])),
                )
            )
    return loads


def _expected(run: Run) -> float:
    ffn = run.config["ffn"]
    return float(ffn["top_k"]) / float(ffn["num_routed"])


def sampling_floor(run: Run) -> float | None:
    """The MaxVio that a perfectly even router shows, because a batch is a finite sample."""
    ffn, recipe = run.config["ffn"], run.config["recipe"]
    if "num_routed" not in ffn or ffn["num_routed"] <= ffn["top_k"]:
        return None
    tokens = recipe["batch_size"] * recipe["seq_len"] * recipe["accumulate"]
    return 1.35 * math.sqrt((ffn["num_routed"] / ffn["top_k"] - 1) / tokens)


def all_loads(study: Study, analysis: Analysis) -> list[tuple[ArmResult, list[LayerLoad]]]:
    """The arms that have experts, with their layers."""
    found = [(arm, layer_loads(study.of(arm.variant))) for arm in analysis.arms]
    return [(arm, loads) for arm, loads in found if loads]
