"""What failed in a study: seeds, batches, first steps, incidents."""

from statistics import fmean, median

from src.laboratory.chosen import Chosen, UndecidedError, of
from src.study import digits


class Failures(Chosen):
    """Counts of what was not finite, after the step from which an arm acts."""

    @property
    def steps(self) -> int:
        """Planned steps of a run; the greatest where they differ."""
        return max(run.max_steps for run in self.folder.study.runs)

    def num_runs(self) -> int:
        """Of all arms."""
        return len(self.folder.rows)

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
        """Of all arms."""
        return sum(arm.nonfinite.events for arm in self.arms)

    def least_failing(self) -> int:
        """Of the arm that has fewest."""
        return min(arm.nonfinite.events for arm in self.arms)

    def batches(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """Non-finite batches of each run after the arm begins to act."""
        return [int(str(r["nonfinite_batches_after"])) for r in self.rows(stability, **fields)]

    def mean_batches(self, stability: str | None = None, **fields: str | None) -> float:
        """Their mean."""
        return fmean(self.batches(stability, **fields))

    def first(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """The first non-finite step of every run that has one."""
        runs = self.runs(stability, **fields)
        return [min(run.nonfinite_steps) for run in runs if run.nonfinite_steps]

    def median_first(self, stability: str | None = None, **fields: str | None) -> float:
        """The median of the first ones."""
        return float(of(median, self.first(stability, **fields)))

    def least_first(self, stability: str | None = None, **fields: str | None) -> int:
        """The earliest of them."""
        return int(of(min, self.first(stability, **fields)))

    def greatest_miss(self, step: float, **fields: str | None) -> float:
        """How far the first non-finite step is from a step, at most, in steps."""
        return float(of(max, [abs(first - step) for first in self.first(**fields)]))

    def lost_after_first(self, **fields: str | None) -> float:
        """Share of the steps from the first non-finite one on that are non-finite."""
        runs = [run for run in self.runs(**fields) if run.nonfinite_steps]
        left = sum(run.steps - min(run.nonfinite_steps) + 1 for run in runs)
        if not left:
            raise UndecidedError("no run is non-finite")
        return sum(len(run.nonfinite_steps) for run in runs) / left

    def outcomes(self, stability: str, outcome: str, **fields: str | None) -> int:
        """Runs of one outcome: clean, intermittent, collapsed, stopped."""
        return sum(arm.outcomes.get(outcome, 0) for arm in self.chosen(stability, **fields))

    def num_runs_of(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs of some arms."""
        return len(self.rows(stability, **fields))

    def median_grad_norm(self, stability: str | None = None, **fields: str | None) -> float:
        """The largest gradient norm of a run, median over those that went non-finite."""
        rows = [row for row in self.rows(stability, **fields) if row["first_nonfinite"]]
        return float(of(median, [float(str(row["grad_norm_max"])) for row in rows]))

    def incidents(self, cause: str | None = None, module: str | None = None) -> int:
        """Runs with an incident of that cause, in a module whose path ends so."""
        found = [run.incident for run in self.folder.study.runs if run.incident]
        return sum(
            (cause is None or incident["cause"] == cause)
            and (module is None or str(incident["module"]).split(".")[-1] == module)
            for incident in found
        )

    def batches_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """Non-finite batches of a run, mean over seeds with its 95 % interval, as text."""
        found = self.one(stability, **fields).nonfinite_batches
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} was finite until it acts")
        if found.low == found.high:
            return digits.fixed(found.mean, 0)
        return f"{digits.fixed(found.mean, 0)} ({digits.between(found.low, found.high, 0)})"
