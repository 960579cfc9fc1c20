"""Early warning over the metrics of a run that is over."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from nonfinite.early_warning import EarlyWarning, Thresholds
from nonfinite.limits import limit_of
from src.lab.detector.cases import STEPS


def followed(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl with nothing but the figures that have a limit."""
    return [
        {name: value for name, value in line.items() if name == "step" or limit_of(name)}
        for line in lines
    ]


def first_alarm(
    lines: Sequence[Mapping[str, float]], thresholds: Thresholds, *, float_max: float | None
) -> dict[str, Any] | None:
    """The first warning over a run's metrics.jsonl, as it came, or would have come, in the run."""
    early = EarlyWarning(
        say=lambda line: None,
        float_max=float_max or torch.finfo(torch.float32).max,
        max_steps=STEPS,
        thresholds=thresholds,
    )
    trainer = cast(Any, None)
    for line in lines:
        early.read_metrics(trainer, line, step=int(line["step"]))
        if early.alarms:
            return early.alarms[0]
    return None
