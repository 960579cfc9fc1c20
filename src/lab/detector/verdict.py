"""One run of the benchmark, judged: was it warned of, and was it understood?"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nonfinite.causes import UNKNOWN
from nonfinite.early_warning import Thresholds
from src.common.run_folder import RunFolder, read_metrics
from src.lab.detector.cases import Case
from src.lab.detector.judged_alarms import first_alarm


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run shows; a row of results.csv."""

    case: str
    kind: str
    is_planted: bool
    """Whether the fault grows as it is told, and not by itself."""
    half: str
    """set: thresholds may be set on it; unseen: reported."""
    seed: int
    first_nonfinite: int | None
    alarm_step: int | None
    """Of the first early warning."""
    alarm_in_run: int | None
    """The same by the thresholds with which the run was trained."""
    alarm_metric: str | None
    alarm_crossing: int | None
    """The step at which it foretold the limit."""
    place: str | None
    """`<module>: <operation>` that was named; None: nothing was."""
    place_right: bool | None
    """None where nothing failed, or no place was planted."""
    cause: str | None
    """None: there is no incident."""
    cause_right: bool | None
    """None where nothing failed."""

    @property
    def failed(self) -> bool:
        """Whether any step was not finite."""
        return self.first_nonfinite is not None

    @property
    def warned(self) -> bool:
        """Whether a warning came before the first step that was not finite, or at all."""
        if self.alarm_step is None:
            return False
        return self.first_nonfinite is None or self.alarm_step < self.first_nonfinite

    def lead(self, steps: int) -> float:
        """Steps between warning and failure as a share of the run; 0 where there was none."""
        if not self.warned or self.first_nonfinite is None or self.alarm_step is None:
            return 0.0
        return (self.first_nonfinite - self.alarm_step) / steps

    def row(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def judge(case: Case, folder: Path, *, half: str, seed: int) -> Verdict:
    """Reads a finished run; its warnings are those of the thresholds as they are now.

    Args:
        case: what was planted.
        folder: the run folder.
        half: set or unseen.
        seed: of the run.
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
    """Whether a cause was named that is not the right one; unknown is none."""
    return verdict.cause_right is False and not is_unknown(verdict)


def is_unknown(verdict: Verdict) -> bool:
    """Whether no cause was named, or no incident recorded."""
    return verdict.cause in (UNKNOWN, None)
