"""Tunes the thresholds of early warning on one half of the seeds, from the logged metrics."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nonfinite.lightning.early_warning import Thresholds
from src.lab.detector.cases import STEPS
from src.lab.detector.verdict import Verdict, first_alarm

GRID = {
    "window": (6, 8, 12),
    "sigmas": (3.0, 4.0, 6.0, 10.0),
    "way_frac": (0.1, 0.15, 0.2, 0.3, 0.4),
    "horizon_frac": (0.25, 0.5, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The effect of one set of thresholds on the tuning runs."""

    thresholds: Thresholds
    false_alarms: int
    warned: int
    drifting: int
    mean_lead: float
    """Mean lead over drifting failures, as a share of the run."""

    @property
    def rank(self) -> tuple[float, ...]:
        """Fewest false alarms first, then most failures with a warning, then the lead."""
        return -self.false_alarms, self.warned, self.mean_lead


def grid() -> Iterator[Thresholds]:
    """All combinations of GRID."""
    for window, sigmas, way_frac, horizon_frac in itertools.product(*GRID.values()):
        yield Thresholds(
            window=int(window), sigmas=sigmas, way_frac=way_frac, horizon_frac=horizon_frac
        )


def try_all(
    runs: Sequence[tuple[Verdict, Sequence[Mapping[str, float]], float | None]],
) -> list[Outcome]:
    """The outcome of every combination, best first.

    Args:
        runs: verdict, metrics and largest finite number of each tuning run.
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
