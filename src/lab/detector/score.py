"""Scores over all runs of the detector benchmark, and a line for each miss."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from src.lab.detector.cases import STEPS
from src.lab.detector.verdict import Verdict, is_unknown, is_wrong


@dataclass(frozen=True, kw_only=True)
class Score:
    """Counts over the runs of one half of the seeds."""

    drifting: int
    """Failures after a drift."""
    warned: int
    """Drifting failures with a warning before them."""
    median_lead: float
    """Median lead of drifting failures, as a share of the run; 0 without a warning."""
    natural: int
    """Drifting failures that were not planted."""
    natural_warned: int
    natural_lead: float
    sudden: int
    sudden_warned: int
    healthy: int
    false_alarms: int
    healthy_incidents: int
    placed: int
    """Failures whose first non-finite operation is known."""
    place_right: int
    incidents: int
    cause_right: int
    cause_unknown: int
    cause_wrong: int
    did_not_fail: int
    """Runs that should have failed but did not; they are not part of the counts above."""


def score(verdicts: Sequence[Verdict]) -> Score:
    """The score over all verdicts of one half."""
    failed = [v for v in verdicts if v.kind != "healthy" and v.failed]
    drifting = [v for v in failed if v.kind == "drift"]
    natural = [v for v in drifting if not v.is_planted]
    sudden = [v for v in failed if v.kind == "sudden"]
    healthy = [v for v in verdicts if v.kind == "healthy"]
    placed = [v for v in failed if v.place_right is not None]
    return Score(
        drifting=len(drifting),
        warned=sum(v.warned for v in drifting),
        median_lead=median([v.lead(STEPS) for v in drifting] or [0.0]),
        natural=len(natural),
        natural_warned=sum(v.warned for v in natural),
        natural_lead=median([v.lead(STEPS) for v in natural] or [0.0]),
        sudden=len(sudden),
        sudden_warned=sum(v.warned for v in sudden),
        healthy=len(healthy),
        false_alarms=sum(v.warned for v in healthy),
        healthy_incidents=sum(v.failed for v in healthy),
        placed=len(placed),
        place_right=sum(bool(v.place_right) for v in placed),
        incidents=len(failed),
        cause_right=sum(bool(v.cause_right) for v in failed),
        cause_unknown=sum(map(is_unknown, failed)),
        cause_wrong=sum(map(is_wrong, failed)),
        did_not_fail=sum(v.kind != "healthy" and not v.failed for v in verdicts),
    )


def misses(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each wrong or missing warning, place and cause."""
    lines = []
    for v in verdicts:
        run = f"{v.case}, seed {v.seed}"
        if v.kind == "healthy" and v.warned:
            lines.append(f"{run}: false alarm at step {v.alarm_step} by {v.alarm_metric}")
        if v.kind == "healthy" and v.failed:
            lines.append(f"{run}: non-finite step {v.first_nonfinite}")
        if v.kind == "drift" and v.failed and not v.warned:
            lines.append(f"{run}: no warning before step {v.first_nonfinite}")
        if v.kind != "healthy" and not v.failed:
            lines.append(f"{run}: did not fail")
        if v.place_right is False:
            lines.append(f"{run}: named {v.place or 'no operation'}")
        if v.kind != "healthy" and v.cause_right is False:
            lines.append(f"{run}: {'no incident' if v.cause is None else f'cause {v.cause}'}")
    return lines
