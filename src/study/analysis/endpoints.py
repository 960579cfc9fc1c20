"""The endpoints of runs, seed by seed: failures after the landmark, counts, losses, costs."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import fmean

from src.common.record import frac_metric, tokens_metric
from src.study.analysis.permutation import Pair
from src.study.analysis.results import Proportion
from src.study.read.collect import Run

AXES = ("steps", "tokens", "active_flops", "seconds")
"""Axes of cost, for losses at equal cost."""

_TOTALS = {"tokens": "tokens", "active_flops": "active_flops", "seconds": "wall_seconds"}

Runs = Mapping[int, Sequence[Run]]
"""Runs by seed, in order of repeats. Every seed has at least one."""

Measure = Callable[[Run], float | None]


def has_ended(run: Run) -> bool:
    """Whether a run can be compared: it finished, or the guard was set to raise and raised.

    Without the latter the very failures that a study counts would be left out.
    """
    raised = run.config.get("guard", {}).get("on_nonfinite") == "raise" and run.nonfinite_steps
    return run.status == "finished" or (run.status == "failed" and bool(raised))


def by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """The runs that have ended, by seed and in order of repeats."""
    found: dict[int, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.repeat)):
        if has_ended(run):
            found.setdefault(run.seed, []).append(run)
    return found


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps that are compared: after `start`, up to and including `end`."""

    start: int
    end: int

    @property
    def is_empty(self) -> bool:
        """Whether it holds no step."""
        return self.start >= self.end

    def of(self, steps: Sequence[int]) -> list[int]:
        """The given steps that lie inside."""
        return [step for step in steps if self.start < step <= self.end]

    def is_at_risk(self, run: Run) -> bool:
        """Whether the run was finite until the window begins."""
        return all(step > self.start for step in run.nonfinite_steps)

    def num_nonfinite(self, run: Run) -> float:
        """The number of batches with a non-finite loss or gradient."""
        return float(len(self.of(run.nonfinite_steps)))

    def steps_until_nonfinite(self, run: Run) -> float:
        """Finite steps before the first such batch; the whole window if there is none."""
        return float(min(self.of(run.nonfinite_steps), default=self.end + 1) - self.start - 1)

    def num_spikes(self, run: Run) -> float:
        """The number of spikes. Every non-finite batch is one, too."""
        return float(len(self.of(run.spike_steps)))

    def failed(self, run: Run) -> float:
        """1 if it went non-finite, else 0."""
        return float(bool(self.of(run.nonfinite_steps)))

    def proportion(self, runs: Runs) -> Proportion:
        """How many of the runs fail."""
        failed = [bool(self.failed(run)) for each in runs.values() for run in each]
        return Proportion(events=sum(failed), total=len(failed))

    def firsts(self, runs: Runs) -> list[int]:
        """The first non-finite step of every run that fails, in order of seeds."""
        found = [self.of(run.nonfinite_steps) for each in runs.values() for run in each]
        return [min(steps) for steps in found if steps]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """An arm and its untreated runs, by seed."""

    arm: Runs
    baseline: Runs
    window: Window
    aa_control: Runs = field(default_factory=dict)
    """The runs of the A/A control that matches the arm: untreated as well."""

    @cached_property
    def shared(self) -> list[int]:
        """The seeds that arm and baseline both have."""
        return [seed for seed in self.arm if seed in self.baseline]

    @cached_property
    def untreated(self) -> Runs:
        """Runs of the baseline and of the A/A control, by shared seed.

        An A/A run that failed before the window began has no part in it.
        """
        return {
            seed: [
                *self.baseline[seed],
                *filter(self.window.is_at_risk, self.aa_control.get(seed, ())),
            ]
            for seed in self.shared
        }

    @cached_property
    def at_risk(self) -> list[int]:
        """The shared seeds whose runs in arm and baseline were finite until the window begins."""
        runs = {seed: [*self.arm[seed], *self.baseline[seed]] for seed in self.shared}
        return [
            seed for seed in self.shared if all(self.window.is_at_risk(run) for run in runs[seed])
        ]

    @property
    def arm_at_risk(self) -> Runs:
        """The arm's runs on the seeds at risk."""
        return {seed: self.arm[seed] for seed in self.at_risk}

    @property
    def untreated_at_risk(self) -> Runs:
        """The untreated runs on the seeds at risk."""
        return {seed: self.untreated[seed] for seed in self.at_risk}

    def pairs(self, measure: Measure) -> dict[int, Pair]:
        """Values by seed, for the seeds at risk on which both sides have one."""
        found = {}
        for seed in self.at_risk:
            one, two = values(self.arm[seed], measure), values(self.untreated[seed], measure)
            if one and two:
                found[seed] = Pair(arm=tuple(one), baseline=tuple(two))
        return found

    def log_rank_scores(self) -> dict[int, Pair]:
        """The score of each run in the log-rank test of the steps until it failed.

        A run that fails at step t scores 1 - H(t), one that does not -H(end), where H is the
        cumulative hazard of all runs (Nelson-Aalen); so a run that fails early scores high, and
        one that never fails scores lowest (Peto and Peto 1972).
        """
        runs = [*self.arm_at_risk.values(), *self.untreated_at_risk.values()]
        firsts = [min(self.window.of(r.nonfinite_steps), default=None) for e in runs for r in e]
        events = Counter(step for step in firsts if step is not None)
        hazards, hazard, left = {}, 0.0, len(firsts)
        for step in sorted(events):
            hazard += events[step] / left
            hazards[step] = hazard
            left -= events[step]

        def score(run: Run) -> float:
            first = min(self.window.of(run.nonfinite_steps), default=None)
            return -hazard if first is None else 1.0 - hazards[first]

        return self.pairs(score)


def values(runs: Sequence[Run], measure: Measure) -> list[float]:
    """The values of the runs that have one."""
    return [value for run in runs if (value := measure(run)) is not None]


def seed_means(runs: Runs, measure: Measure) -> list[float]:
    """The mean of every seed that has a value."""
    return [fmean(found) for each in runs.values() if (found := values(each, measure))]


def is_marked(run: Run) -> bool:
    """Whether its last validation had windows with a non-finite loss."""
    return run.results.get("val_nonfinite_frac", 0.0) > 0


def clean_loss(run: Run, *, step: int) -> float | None:
    """Validation loss at a step; None unless the whole run up to it was finite.

    A step before the last one must have a validation.
    """
    if any(bad <= step for bad in run.nonfinite_steps):
        return None
    if run.outcome in ("collapsed", "stopped", "failed") and step >= run.steps:
        return None
    metric = run.loss_metric
    if step >= run.steps:
        return None if is_marked(run) else run.results.get("val_loss")
    frac = frac_metric(metric)
    line = next((line for line in run.lines if line["step"] == step and metric in line), {})
    return None if line.get(frac, 0.0) > 0 else _finite(line.get(metric))


def nonfinite_tokens(run: Run, *, step: int) -> float | None:
    """The share of validation tokens without a finite loss, in the last validation up to a step.

    None if there is none, or if it was not counted. Unlike a count of training batches, it does not
    depend on the number of tokens in a batch.
    """
    if step >= run.steps:
        return run.results.get("val_nonfinite_tokens")
    shares = reversed(run.curve(tokens_metric(run.loss_metric)))
    return next((share for at, share in shares if at <= step), None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def total(run: Run, axis: str) -> float | None:
    """The cost of the whole run on an axis: steps, tokens, active_flops or seconds."""
    value = run.record.get("steps" if axis == "steps" else _TOTALS[axis])
    return None if value is None else float(value)


def loss_at(run: Run, budget: float, axis: str) -> float | None:
    """Validation loss at a given cost, linearly interpolated between validations.

    Args:
        run: the run.
        budget: the cost, in units of the axis.
        axis: steps, tokens, active_flops or seconds. All steps of a run count as equally costly.

    Returns:
        None before the first validation, after the last, and if the record has no total.
    """
    spent, steps = total(run, axis), run.steps
    curve = run.curve(run.loss_metric)
    if not spent or not steps or not curve:
        return None
    step = budget * steps / spent
    # The run's total cost must give its last step, whatever the rounding of the division.
    step = round(step) if math.isclose(step, round(step), rel_tol=1e-9) else step
    for (left, before), (right, after) in pairwise(curve):
        if left <= step <= right:
            return before + (after - before) * (step - left) / (right - left)
    return curve[0][1] if len(curve) == 1 and step == curve[0][0] else None
