"""Losses, loads and costs of a study's arms."""

import math
from collections.abc import Sequence
from statistics import fmean

from src.common import number_format as digits_of
from src.lab.book.chosen import Chosen, UndecidedError, of
from src.study.analysis import rates
from src.study.analysis.rows import Row


class Losses(Chosen):
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
        return f"{int(str(self.rows(stability, **fields)[0]['cache_bytes_per_token'])):,}"

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
        return _mean(self.rows(stability, **fields), "nonfinite_frac")

    def mean_spikes(self, stability: str | None = None, **fields: str | None) -> float:
        """Steps of a run that any definition calls a spike."""
        return float(of(fmean, [len(run.spike_steps) for run in self.runs(stability, **fields)]))

    def max_violation(self, stability: str | None = None, **fields: str | None) -> float:
        """MaxVio over the last quarter of the run, mean over layers and runs."""
        return _mean(self.rows(stability, **fields), "max_violation")

    def mean_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Training loss at the end, mean over the runs that have one."""
        return _mean(self.rows(stability, **fields), "train_loss")

    def greatest_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """The same of the worst run; without bound where a run has none."""
        rows = self.rows(stability, **fields)
        return max(float(str(row["train_loss"] or math.inf)) for row in rows)

    def overfitting(self, stability: str | None = None, **fields: str | None) -> float:
        """By how much the last validation loss is above the best one; the least of any run."""
        rows = [row for row in self.rows(stability, **fields) if row["loss"] and row["best_loss"]]
        return float(of(min, [float(str(r["loss"])) - float(str(r["best_loss"])) for r in rows]))

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
        rows = [row for row in self.folder.rows if row["seconds"]]
        shares = [int(str(r["own_steps"])) / max(1, int(str(r["steps"]))) for r in rows]
        seconds = [float(str(r["seconds"])) for r in rows]
        return sum(t * s for t, s in zip(seconds, shares, strict=True)) / 3600


def _mean(rows: Sequence[Row], column: str) -> float:
    return float(of(fmean, [float(str(row[column])) for row in rows if row[column]]))
