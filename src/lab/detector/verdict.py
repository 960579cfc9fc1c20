"""Judges one run of the detector benchmark: its warning, and the place and cause of failure."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nonfinite.causes import UNKNOWN
from nonfinite.lightning.early_warning import EarlyWarning, Thresholds
from nonfinite.limits import limit_of
from src.common.run_folder import RunFolder, read_metrics
from src.lab.detector.cases import STEPS, Case


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of a run; a row of results.csv."""

    case: str
    kind: str
    is_planted: bool
    """Whether the fault is built in and grows at a prescribed rate."""
    half: str
    """set: used for tuning thresholds; unseen: only reported."""
    seed: int
    first_nonfinite: int | None
    alarm_step: int | None
    """Step of the first early warning."""
    alarm_in_run: int | None
    """Step of the first warning in the run itself, whose thresholds may have been others."""
    alarm_metric: str | None
    alarm_crossing: int | None
    """The step at which the warning predicted the limit."""
    place: str | None
    """`<module>: <operation>` in the incident; None without an incident."""
    place_right: bool | None
    """None if the run did not fail, or if the right place is unknown."""
    cause: str | None
    """Cause in the incident; None without an incident."""
    cause_right: bool | None
    """None if the run did not fail."""

    @property
    def failed(self) -> bool:
        """Whether any step was non-finite."""
        return self.first_nonfinite is not None

    @property
    def warned(self) -> bool:
        """Whether a warning came, before the first non-finite step if there is one."""
        if self.alarm_step is None:
            return False
        return self.first_nonfinite is None or self.alarm_step < self.first_nonfinite

    def lead(self, steps: int) -> float:
        """Steps between warning and failure as a share of the run; 0 without a warning."""
        if not self.warned or self.first_nonfinite is None or self.alarm_step is None:
            return 0.0
        return (self.first_nonfinite - self.alarm_step) / steps

    def row(self) -> dict[str, Any]:
        """The row of results.csv."""
        return asdict(self)


def limited_metrics(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, reduced to steps and to metrics that have a limit."""
    return [
        {name: value for name, value in line.items() if name == "step" or limit_of(name)}
        for line in lines
    ]


def first_alarm(
    lines: Sequence[Mapping[str, float]], thresholds: Thresholds, *, float_max: float | None
) -> dict[str, Any] | None:
    """The first alarm that early warning raises on a run's logged metrics; None without one."""
    early = EarlyWarning(
        say=lambda line: None,
        float_max=float_max or torch.finfo(torch.float32).max,
        max_steps=STEPS,
        thresholds=thresholds,
    )
    # With all settings given, EarlyWarning does not use the trainer.
    trainer = cast(Any, None)
    for line in lines:
        early.read_metrics(trainer, line, step=int(line["step"]))
        if early.alarms:
            return early.alarms[0]
    return None


def judge(case: Case, folder: Path, *, half: str, seed: int) -> Verdict:
    """Judges a finished run; computes its warnings with the current thresholds.

    Args:
        case: the kind of run.
        folder: the run folder.
        half: set or unseen.
        seed: the run's seed.
    """
    record = RunFolder(folder).read_record()
    assert record is not None, folder
    lines = read_metrics(folder / "metrics.jsonl")
    alarm = first_alarm(lines, Thresholds(), float_max=case.float_max)
    first = record["guard"]["first_nonfinite_step"]
    failed = first is not None
    incident = record["incident"]
    place = cause = None
    if incident is not None:
        file = folder / "incidents" / f"step-{incident['step']}" / "incident.json"
        finding = json.loads(file.read_text(encoding="utf-8"))["finding"]
        place = "nothing" if finding is None else f"{finding['module']}: {finding['operation']}"
        cause = incident["cause"]
    return Verdict(
        case=case.name,
        kind=case.kind,
        is_planted=case.is_planted,
        half=half,
        seed=seed,
        first_nonfinite=first,
        alarm_step=None if alarm is None else alarm["step"],
        alarm_in_run=record["alarms"][0]["step"] if record["alarms"] else None,
        alarm_metric=None if alarm is None else alarm["metric"],
        alarm_crossing=None if alarm is None else alarm["crossing_step"],
        place=place,
        place_right=bool(re.match(case.place, place or "")) if failed and case.place else None,
        cause=cause,
        cause_right=cause == case.cause if failed else None,
    )


def is_wrong(verdict: Verdict) -> bool:
    """Whether the named cause is wrong; `unknown` does not count as wrong."""
    return verdict.cause_right is False and not is_unknown(verdict)


def is_unknown(verdict: Verdict) -> bool:
    """Whether the cause is unknown or no incident was recorded."""
    return verdict.cause in (UNKNOWN, None)
