"""Losses, loads and costs of a study's arms."""

import math
from statistics import fmean

from src.common import number_format as digits_of
from src.lab.book.select_arms import StudyArms, UndecidedError, of
from src.study.analysis import rates


class Losses(StudyArms):
    """What the arms reach, and what it takes."""

    def mean_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Final validation loss of the seeds that stayed clean, in nats a token."""
        found = self.one(stability, **fields).loss
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} is clean")
        return found.mean

    def loss_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """Its 95 % interval over seeds, as text."""
        found = self.one(stability, **fields).loss
        return "" if found is None else digits_of.between(found.low, found.high)

    def cache_bytes(self, stability: str | None = None, **fields: str | None) -> str:
        """Bytes of the cache that a token takes in decoding, as text."""
        return f"{self.known('cache_bytes_per_token', stability, **fields)[0]:,}"

    def best_loss(self, options: str, **fields: str | None) -> float:
        """The lowest of the mean losses of several options."""
        return min(self.mean_loss(option, **fields) for option in options.split(","))

    def marked(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs whose validation had windows without a finite loss."""
        return sum(arm.num_marked for arm in self.chosen(stability, **fields))

    def mean_nonfinite_frac(self, stability: str | None = None, **fields: str | None) -> float:
        """Share of the last validation's windows without a finite loss, mean over the runs.

        Of the averaged weights where an option evaluates those.
        """
        return float(of(fmean, self.known("nonfinite_frac", stability, **fields)))

    def mean_spikes(self, stability: str | None = None, **fields: str | None) -> float:
        """Steps of a run that any definition calls a spike."""
        return float(of(fmean, [len(run.spike_steps) for run in self.runs(stability, **fields)]))

    def max_violation(self, stability: str | None = None, **fields: str | None) -> float:
        """MaxVio over the last quarter of the run, mean over layers and runs."""
        return float(of(fmean, self.known("max_violation", stability, **fields)))

    def mean_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Training loss at the end, mean over the runs that have one."""
        return float(of(fmean, self.known("train_loss", stability, **fields)))

    def greatest_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """The same of the worst run; without bound where a run has none."""
        return float(self.results(stability, **fields)["train_loss"].fillna(math.inf).max())

    def overfitting(self, stability: str | None = None, **fields: str | None) -> float:
        """By how much the last validation loss is above the best one; the least of any run."""
        runs = self.results(stability, **fields).dropna(subset=["loss", "best_loss"])
        return float(of(min, list(runs["loss"] - runs["best_loss"])))

    def sensitivity(self, stability: str) -> float:
        """LR sensitivity of an option (arXiv 2309.14322), mean over seeds."""
        families = {family.label: family for family in rates.families(self.folder.study)}
        if stability not in families:
            raise UndecidedError(f"{stability} has too few rates; known: {', '.join(families)}")
        found = families[stability].sensitivity
        if found is None:
            raise UndecidedError(f"no seed of {stability} has every rate")
        return found.mean

    def text(self, measure: str, *args: str, digits: int = 2, **fields: str | None) -> str:
        """A measure with so many decimals; a dash where it is undecided."""
        try:
            return digits_of.fixed(getattr(self, measure)(*args, **fields), digits)
        except UndecidedError:
            return digits_of.NONE

    def core_hours(self) -> float:
        """What all runs took on one core each, without steps taken from another's state."""
        runs = self.folder.results.dropna(subset="seconds")
        return (
            float((runs["seconds"] * runs["own_steps"] / runs["steps"].clip(lower=1)).sum()) / 3600
        )
