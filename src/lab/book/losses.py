"""The losses, loads and costs of a study's arms."""

import math
from statistics import fmean

from src.common import number_format as digits_of
from src.lab.book.select_arms import StudyArms, UndecidedError, statistic
from src.study.analysis import rates


class Losses(StudyArms):
    """Losses, loads and costs."""

    def mean_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Final validation loss of the clean seeds, in nats per token."""
        found = self.one(stability, **fields).loss
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} is clean")
        return found.mean

    def loss_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """The 95 % interval of the final validation loss over seeds, as text."""
        found = self.one(stability, **fields).loss
        return "" if found is None else digits_of.between(found.low, found.high)

    def cache_bytes(self, stability: str | None = None, **fields: str | None) -> str:
        """The cache's bytes per token in decoding, as text."""
        return f"{self.known('cache_bytes_per_token', stability, **fields)[0]:,}"

    def best_loss(self, options: str, **fields: str | None) -> float:
        """The lowest mean loss of several remedies, given as a comma-separated list."""
        return min(self.mean_loss(option, **fields) for option in options.split(","))

    def marked(self, stability: str | None = None, **fields: str | None) -> int:
        """The number of runs whose last validation had non-finite windows."""
        return sum(arm.num_marked for arm in self.chosen(stability, **fields))

    def mean_nonfinite_frac(self, stability: str | None = None, **fields: str | None) -> float:
        """The share of non-finite windows in the last validation, mean over the runs.

        If the remedy evaluates averaged weights, it is the share with those.
        """
        return float(statistic(fmean, self.known("nonfinite_frac", stability, **fields)))

    def mean_spikes(self, stability: str | None = None, **fields: str | None) -> float:
        """The number of spikes per run, by any of the definitions."""
        return float(
            statistic(fmean, [len(run.spike_steps) for run in self.runs(stability, **fields)])
        )

    def max_violation(self, stability: str | None = None, **fields: str | None) -> float:
        """MaxVio over the last quarter of the run, mean over layers and runs."""
        return float(statistic(fmean, self.known("max_violation", stability, **fields)))

    def mean_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """The final training loss, mean over the runs that have one."""
        return float(statistic(fmean, self.known("train_loss", stability, **fields)))

    def greatest_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """The highest final training loss of any run; infinite if a run has none."""
        return float(self.results(stability, **fields)["train_loss"].fillna(math.inf).max())

    def overfitting(self, stability: str | None = None, **fields: str | None) -> float:
        """The smallest amount, of any run, by which the final validation loss exceeds the best."""
        runs = self.results(stability, **fields).dropna(subset=["loss", "best_loss"])
        return float(statistic(min, list(runs["loss"] - runs["best_loss"])))

    def sensitivity(self, stability: str) -> float:
        """LR sensitivity of a remedy (arXiv 2309.14322), mean over seeds."""
        families = {family.label: family for family in rates.families(self.folder.study)}
        if stability not in families:
            raise UndecidedError(f"{stability} has too few rates; known: {', '.join(families)}")
        found = families[stability].sensitivity
        if found is None:
            raise UndecidedError(f"no seed of {stability} has every rate")
        return found.mean

    def text(self, measure: str, *args: str, digits: int = 2, **fields: str | None) -> str:
        """A measure as text with some decimals; a dash if it is undecided."""
        try:
            return digits_of.fixed(getattr(self, measure)(*args, **fields), digits)
        except UndecidedError:
            return digits_of.NONE

    def core_hours(self) -> float:
        """Core hours of all runs, one core each, with shared steps counted once."""
        runs = self.folder.results.dropna(subset="seconds")
        return (
            float((runs["seconds"] * runs["own_steps"] / runs["steps"].clip(lower=1)).sum()) / 3600
        )
