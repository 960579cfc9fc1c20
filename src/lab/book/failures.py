"""The failures of a study: seeds, batches, first steps, incidents."""

from collections.abc import Mapping
from statistics import median

import numpy as np

from src.common import number_format
from src.lab.book.select_arms import StudyArms, UndecidedError, statistic
from src.study.analysis.permutation import NUM_DRAWN
from src.study.analysis.results import Estimate, Proportion
from src.study.read.collect import Run, flat


class Failures(StudyArms):
    """Counts of failures.

    Seeds and batches are counted after the arm begins to act, on seeds that were finite until
    then. First steps, spikes and outcomes are those of whole runs. Runs that have not ended are not
    counted.
    """

    @property
    def steps(self) -> int:
        """The planned number of steps of a run; the largest if they differ."""
        return max(run.max_steps for run in self.folder.study.runs)

    def num_runs(self) -> int:
        """The number of runs of all arms."""
        return len(self.folder.results)

    def seeds(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of seeds, summed over the arms."""
        return sum(arm.num_seeds for arm in self.chosen(stability, **fields))

    def seeds_at_risk(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of seeds that were finite until the arm begins to act."""
        return sum(arm.num_at_risk for arm in self.chosen(stability, **fields))

    def runs_at_risk(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs that were finite until the arm begins to act."""
        return sum(arm.nonfinite.total for arm in self.chosen(stability, **fields))

    def failing(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs that fail after the arm begins to act, summed over the arms."""
        return sum(arm.nonfinite.events for arm in self.chosen(stability, **fields))

    def failing_untreated(self, stability: str, **fields: str | None) -> int:
        """The number of untreated runs that fail after the arm begins to act."""
        return self._untreated(stability, fields).events

    def untreated_at_risk(self, stability: str, **fields: str | None) -> int:
        """The number of untreated runs, of baseline and A/A control, with which it is compared."""
        return self._untreated(stability, fields).total

    def _untreated(self, stability: str, fields: Mapping[str, str | None]) -> Proportion:
        found = self.one(stability, **fields).untreated_nonfinite
        if found is None:
            raise UndecidedError(f"{stability} has no baseline")
        return found

    def sum_failing(self) -> int:
        """The number of runs, of all arms, with a non-finite batch at any step."""
        return sum(bool(run.nonfinite_steps) for arm in self.arms for run in self.ended(arm))

    def least_failing(self) -> int:
        """The smallest number of failing runs of any arm with a run at risk."""
        return int(statistic(min, [a.nonfinite.events for a in self.arms if a.nonfinite.total]))

    def batches(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """Non-finite batches of each run after the arm begins to act."""
        return [
            sum(step > arm.acts_from for step in run.nonfinite_steps)
            for arm in self.chosen(stability, **fields)
            for run in self.ended(arm)
            if all(step > arm.acts_from for step in run.nonfinite_steps)
        ]

    def mean_batches(self, stability: str | None = None, **fields: str | None) -> float:
        """Non-finite batches after the arm begins to act, mean over seeds."""
        return self._batches(stability, fields).mean

    def _batches(self, stability: str | None, fields: Mapping[str, str | None]) -> Estimate:
        found = self.one(stability, **fields).nonfinite_batches
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} was finite until the arm acts")
        return found

    def first(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """The first non-finite step of every failing run."""
        return [min(run.nonfinite_steps) for run in self._failed(stability, fields)]

    def _failed(self, stability: str | None, fields: Mapping[str, str | None]) -> list[Run]:
        return [run for run in self.runs(stability, **fields) if run.nonfinite_steps]

    def failed_by(self, step: int, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs that failed at or before a step."""
        return sum(first <= step for first in self.first(stability, **fields))

    def failing_or_marked(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs with any non-finite batch or non-finite validation window."""
        runs = self.runs(stability, **fields)
        marked = [
            any(line[key] > 0 for line in run.lines for key in line if key.endswith("_frac"))
            for run in runs
        ]
        return sum(bool(run.nonfinite_steps) or m for run, m in zip(runs, marked, strict=True))

    def spiked_before(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of failing runs with a spike before their first non-finite batch."""
        return sum(
            any(step < min(run.nonfinite_steps) for step in run.spike_steps)
            for run in self._failed(stability, fields)
        )

    def peaked_before(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of failing runs whose largest gradient norm came before the failure."""
        runs = self.results(stability, **fields).dropna(
            subset=["first_nonfinite", "grad_norm_max_step"]
        )
        return int((runs["grad_norm_max_step"] < runs["first_nonfinite"]).sum())

    def median_first(self, stability: str | None = None, **fields: str | None) -> float:
        """The median first non-finite step."""
        return float(statistic(median, self.first(stability, **fields)))

    def least_first(self, stability: str | None = None, **fields: str | None) -> int:
        """The earliest first non-finite step."""
        return int(statistic(min, self.first(stability, **fields)))

    def greatest_miss(self, step: float, **fields: str | None) -> float:
        """The largest distance of a first non-finite step from a given step."""
        return float(statistic(max, [abs(first - step) for first in self.first(**fields)]))

    def lost_after_first(self, stability: str | None = None, **fields: str | None) -> float:
        """The share of non-finite steps from the first one on."""
        runs = self._failed(stability, fields)
        left = sum(run.steps - min(run.nonfinite_steps) + 1 for run in runs)
        if not left:
            raise UndecidedError("no run failed")
        return sum(len(run.nonfinite_steps) for run in runs) / left

    def outcomes(self, stability: str, outcome: str, **fields: str | None) -> int:
        """The number of runs with an outcome: clean, intermittent, collapsed, stopped."""
        return sum(arm.outcomes.get(outcome, 0) for arm in self.chosen(stability, **fields))

    def num_runs_of(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs of some arms."""
        return len(self.results(stability, **fields))

    def shares_lost(
        self, stability: str | None = None, *, after: int, until: int, **fields: str | None
    ) -> list[float]:
        """The share of non-finite batches between two steps, for each failing run."""
        found = [
            sum(after < step <= until for step in run.nonfinite_steps) / (until - after)
            for run in self._failed(stability, fields)
        ]
        return sorted(found)

    def grad_norms(
        self, stability: str | None = None, *, sound: bool = False, **fields: str | None
    ) -> list[float]:
        """The largest gradient norm of each run; with `sound`, only of runs that stayed finite."""
        runs = self.results(stability, **fields)
        if sound:
            runs = runs[runs["first_nonfinite"].isna()]
        return sorted(runs["grad_norm_max"].dropna())

    def greatest_grad_norm(self, stability: str | None = None, **fields: str | None) -> float:
        """The largest gradient norm of any run."""
        return float(statistic(max, self.grad_norms(stability, sound=False, **fields)))

    def incidents(self, cause: str | None = None, module: str | None = None) -> int:
        """The number of distinct first incidents with a cause and a module name."""
        # Arms that share steps, or train identically, share their incidents.
        found = {
            (run.seed, incident["step"], incident["module"], incident["cause"])
            for run in self.folder.study.runs
            if (incident := run.incident)
        }
        return sum(
            (cause is None or its_cause == cause)
            and (module is None or str(place).split(".")[-1] == module)
            for _, _, place, its_cause in found
        )

    def batches_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """Non-finite batches per run, mean over seeds with its 95 % interval, as text."""
        found = self._batches(stability, fields)
        if found.low == found.high:
            return number_format.fixed(found.mean, 0)
        between = number_format.between(found.low, found.high, 0)
        return f"{number_format.fixed(found.mean, 0)} ({between})"

    def trend_p(self, field: str) -> float:
        """P value of a trend of failures over a field's values, which are exchanged within seeds.

        The statistic is the sum of the ranks of the values at which runs fail (Cochran-Armitage).
        """
        runs = [run for arm in self.arms for run in self.ended(arm) if not arm.is_aa_control]
        levels = sorted({float(flat(run.config, ("recipe",))[f"recipe.{field}"]) for run in runs})
        by_seed: dict[int, list[tuple[int, bool]]] = {}
        for run in runs:
            level = levels.index(float(flat(run.config, ("recipe",))[f"recipe.{field}"]))
            by_seed.setdefault(run.seed, []).append((level, bool(run.nonfinite_steps)))
        random = np.random.default_rng(0)
        observed, drawn = 0.0, np.zeros(NUM_DRAWN)
        for each in by_seed.values():
            ranks, failed = np.array(each, dtype=float).T
            ranks -= ranks.mean()
            observed += float(ranks @ failed)
            drawn += random.permuted(np.tile(ranks, (NUM_DRAWN, 1)), axis=1) @ failed
        return float((1 + (np.abs(drawn) >= abs(observed) - 1e-9).sum()) / (NUM_DRAWN + 1))
