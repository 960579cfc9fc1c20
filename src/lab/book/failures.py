"""What failed in a study: seeds, batches, first steps, incidents."""

from collections.abc import Mapping
from statistics import median

from src.common import number_format
from src.lab.book.select_arms import StudyArms, UndecidedError, of
from src.study.analysis.results import Estimate
from src.study.read.collect import Run


class Failures(StudyArms):
    """Counts of batches that were not finite.

    Seeds and batches are counted after the step from which an arm acts, on seeds that were finite
    until then; first steps, spikes and outcomes are of whole runs. Runs that have not ended count
    nowhere.
    """

    @property
    def steps(self) -> int:
        """Planned steps of a run; the greatest where they differ."""
        return max(run.max_steps for run in self.folder.study.runs)

    def num_runs(self) -> int:
        """Of all arms."""
        return len(self.folder.results)

    def seeds(self, stability: str | None = None, **fields: str | None) -> int:
        """Seeds, summed over the arms."""
        return sum(arm.num_seeds for arm in self.chosen(stability, **fields))

    def seeds_at_risk(self, stability: str | None = None, **fields: str | None) -> int:
        """Those that were finite until the arm acts."""
        return sum(arm.nonfinite.total for arm in self.chosen(stability, **fields))

    def failing(self, stability: str | None = None, **fields: str | None) -> int:
        """Seeds that go non-finite after the arm begins to act, summed over the arms."""
        return sum(arm.nonfinite.events for arm in self.chosen(stability, **fields))

    def failing_untreated(self, stability: str, **fields: str | None) -> int:
        """Seeds of its baseline that go non-finite while the arm acts."""
        found = self.one(stability, **fields).baseline_nonfinite
        if found is None:
            raise UndecidedError(f"{stability} is compared with nothing")
        return found.events

    def sum_failing(self) -> int:
        """Runs of all arms with a non-finite batch at any step."""
        return sum(bool(run.nonfinite_steps) for arm in self.arms for run in self.ended(arm))

    def least_failing(self) -> int:
        """Of the arm that has fewest, of those with a seed at risk."""
        return int(of(min, [a.nonfinite.events for a in self.arms if a.nonfinite.total]))

    def batches(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """Non-finite batches of each run after the arm begins to act."""
        return [
            sum(step > arm.acts_from for step in run.nonfinite_steps)
            for arm in self.chosen(stability, **fields)
            for run in self.ended(arm)
            if all(step > arm.acts_from for step in run.nonfinite_steps)
        ]

    def mean_batches(self, stability: str | None = None, **fields: str | None) -> float:
        """The mean over seeds."""
        return self._batches(stability, fields).mean

    def _batches(self, stability: str | None, fields: Mapping[str, str | None]) -> Estimate:
        found = self.one(stability, **fields).nonfinite_batches
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} was finite until it acts")
        return found

    def first(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """The first non-finite step of every run that has one."""
        return [min(run.nonfinite_steps) for run in self._failed(stability, fields)]

    def _failed(self, stability: str | None, fields: Mapping[str, str | None]) -> list[Run]:
        return [run for run in self.runs(stability, **fields) if run.nonfinite_steps]

    def failed_by(self, step: int, stability: str | None = None, **fields: str | None) -> int:
        """Runs that were non-finite at or before a step."""
        return sum(first <= step for first in self.first(stability, **fields))

    def failing_or_marked(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs with a non-finite batch, or a validation window without a finite loss, ever."""
        runs = self.runs(stability, **fields)
        marked = [
            any(line[key] > 0 for line in run.lines for key in line if key.endswith("_frac"))
            for run in runs
        ]
        return sum(bool(run.nonfinite_steps) or m for run, m in zip(runs, marked, strict=True))

    def spiked_before(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs that failed and had a spike before their first non-finite batch."""
        return sum(
            any(step < min(run.nonfinite_steps) for step in run.spike_steps)
            for run in self._failed(stability, fields)
        )

    def peaked_before(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs that failed and had their largest gradient norm before the first such batch."""
        runs = self.results(stability, **fields).dropna(
            subset=["first_nonfinite", "grad_norm_max_step"]
        )
        return int((runs["grad_norm_max_step"] < runs["first_nonfinite"]).sum())

    def median_first(self, stability: str | None = None, **fields: str | None) -> float:
        """The median of the first ones."""
        return float(of(median, self.first(stability, **fields)))

    def least_first(self, stability: str | None = None, **fields: str | None) -> int:
        """The earliest of them."""
        return int(of(min, self.first(stability, **fields)))

    def greatest_miss(self, step: float, **fields: str | None) -> float:
        """How far the first non-finite step is from a step, at most, in steps."""
        return float(of(max, [abs(first - step) for first in self.first(**fields)]))

    def lost_after_first(self, stability: str | None = None, **fields: str | None) -> float:
        """Share of the steps from the first non-finite one on that are non-finite."""
        runs = self._failed(stability, fields)
        left = sum(run.steps - min(run.nonfinite_steps) + 1 for run in runs)
        if not left:
            raise UndecidedError("no run is non-finite")
        return sum(len(run.nonfinite_steps) for run in runs) / left

    def outcomes(self, stability: str, outcome: str, **fields: str | None) -> int:
        """Runs of one outcome: clean, intermittent, collapsed, stopped."""
        return sum(arm.outcomes.get(outcome, 0) for arm in self.chosen(stability, **fields))

    def num_runs_of(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs of some arms."""
        return len(self.results(stability, **fields))

    def shares_lost(
        self, stability: str | None = None, *, after: int, until: int, **fields: str | None
    ) -> list[float]:
        """Share of non-finite batches between two steps, of each run that ever failed."""
        found = [
            sum(after < step <= until for step in run.nonfinite_steps) / (until - after)
            for run in self._failed(stability, fields)
        ]
        return sorted(found)

    def grad_norms(
        self, stability: str | None = None, *, sound: bool = False, **fields: str | None
    ) -> list[float]:
        """The largest gradient norm of each run, of each that stayed finite with `sound`."""
        runs = self.results(stability, **fields)
        if sound:
            runs = runs[runs["first_nonfinite"].isna()]
        return sorted(runs["grad_norm_max"].dropna())

    def greatest_grad_norm(self, stability: str | None = None, **fields: str | None) -> float:
        """The largest of any run."""
        return float(of(max, self.grad_norms(stability, sound=False, **fields)))

    def incidents(self, cause: str | None = None, module: str | None = None) -> int:
        """Distinct first incidents of that cause, in a module whose path ends so."""
        # Arms that share a beginning, or train as another does, share what happens there.
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
        """Non-finite batches of a run, mean over seeds with its 95 % interval, as text."""
        found = self._batches(stability, fields)
        if found.low == found.high:
            return number_format.fixed(found.mean, 0)
        between = number_format.between(found.low, found.high, 0)
        return f"{number_format.fixed(found.mean, 0)} ({between})"
