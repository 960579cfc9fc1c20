"""Thresholds of early warning, set on one half of the benchmark by going over its metrics again."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nonfinite.early_warning import Thresholds
from src.lab.detector.cases import STEPS
from src.lab.detector.judged_alarms import first_alarm
from src.lab.detector.verdict import Verdict

GRID = {
    "window": (6, 8, 12),
    "sigmas": (3.0, 4.0, 6.0, 10.0),
    "way_frac": (0.1, 0.15, 0.2, 0.3, 0.4),
    "horizon_frac": (0.25, 0.5, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What some thresholds would have done on the half."""

    thresholds: Thresholds
    false_alarms: int
    warned: int
    drifting: int
    mean_lead: float
    """Over the drifting failures, as a share of the run."""

    @property
    def rank(self) -> tuple[float, ...]:
        """No false alarm first, then failures warned of, then the lead."""
        return -self.false_alarms, self.warned, self.mean_lead


def grid() -> Iterator[Thresholds]:
    """All combinations."""
    for window, sigmas, way_frac, horizon_frac in itertools.product(*GRID.values()):
        yield Thresholds(
            window=int(window), sigmas=sigmas, way_frac=way_frac, horizon_frac=horizon_frac
        )


def try_all(
    runs: Sequence[tuple[Verdict, Sequence[Mapping[str, float]], float | None]],
) -> list[Outcome]:
    """The outcome of every combination, the best first.

    Args:
        runs: verdict, metrics and largest number of each run of the half.
    """
    outcomes = []
    for thresholds in grid():
        false_alarms = warned = drifting = 0
        leads = []
        for verdict, lines, float_max in runs:
            failed = verdict.first_nonfinite
            if verdict.kind == "sudden" or (verdict.kind == "drift" and failed is None):
                continue
            alarm = first_alarm(lines, thresholds, float_max=float_max)
            if verdict.kind == "healthy":
                false_alarms += alarm is not None
                continue
            drifting += 1
            assert failed is not None
            lead = 0 if alarm is None else max(0, failed - alarm["step"])
            warned += lead > 0
            leads.append(lead / STEPS)
        outcomes.append(
            Outcome(
                thresholds=thresholds,
                false_alarms=false_alarms,
                warned=warned,
                drifting=drifting,
                mean_lead=math.fsum(leads) / max(1, len(leads)),
            )
        )
    return sorted(outcomes, key=lambda outcome: outcome.rank, reverse=True)
