"""The words in which predictions and pages speak of a study's results.

Arms are chosen by the name of their option and by what their variant's name says:
`failing('none')`, `mean_loss(attention='gqa', num_kv_heads='1')`; `scale=None` are arms whose name
has no such field.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import fmean, median
from typing import Any

from src.laboratory.files import StudyFolder
from src.naming import fields_of
from src.study import digits, rates
from src.study.analysis import arm_results
from src.study.collect import Run
from src.study.results import ArmResult, Comparison
from src.study.rows import Row
from src.study.stats import ALPHA


class UndecidedError(ValueError):
    """There is no run, or none that stayed finite, of which something could be said."""


class Measures:
    """What one study shows.

    Args:
        folder: of the study, which has results.csv.
        others: gives another study's, by name.
    """

    def __init__(self, folder: StudyFolder, others: Callable[[str], "Measures"]) -> None:
        self.folder, self.others = folder, others

    @cached_property
    def arms(self) -> list[ArmResult]:
        """All variants, baselines first."""
        return arm_results(self.folder.study)

    def words(self) -> dict[str, Any]:
        """Every measure by the name that pages and predictions call it by."""
        names = [
            *("failing", "seeds", "seeds_at_risk", "detected", "fewer_detected", "better", "worse"),
            *(
                "null_detected",
                "difference",
                "interval",
                "p_value",
                "null_width",
                "smallest_effect",
            ),
            *("incidents", "first", "median_first", "least_first", "batches", "mean_batches"),
            *("sum_failing", "least_failing", "greatest_miss", "lost_after_first", "max_violation"),
            *("mean_loss", "best_loss", "mean_spikes", "sensitivity", "greatest_train_loss"),
            *("mean_train_loss", "overfitting", "cost", "num_runs", "verdict", "marked"),
            *("has", "cache_bytes", "loss_interval", "share_interval", "batches_interval"),
            *("median_grad_norm", "outcomes", "num_runs_of", "loss_gap"),
            "failing_untreated",
        ]
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return found | {"other": self.others, "steps": self.steps, "abs": abs, "round": round}

    # ------------------------------------------------------------------ choosing

    def chosen(self, stability: str | None = None, **fields: str | None) -> list[ArmResult]:
        """The arms of an option and of fields.

        Raises:
            UndecidedError: there is none.
        """
        wanted = fields if stability is None else {"stability": stability, **fields}
        found = [arm for arm in self.arms if _fits(self._fields(arm), wanted)]
        if not found:
            raise UndecidedError(f"no arm of {self.folder.name} has {wanted}")
        return found

    def has(self, stability: str | None = None, **fields: str | None) -> bool:
        """Whether there is an arm of that option and those fields."""
        wanted = fields if stability is None else {"stability": stability, **fields}
        return any(_fits(self._fields(arm), wanted) for arm in self.arms)

    def one(self, stability: str | None = None, **fields: str | None) -> ArmResult:
        """The one arm of an option and of fields: where several fit, the one that has no others.

        Raises:
            ValueError: several have as few.
        """
        found = self.chosen(stability, **fields)
        fewest = min(len(self._fields(arm)) for arm in found)
        plain = [arm for arm in found if len(self._fields(arm)) == fewest]
        if len(plain) > 1:
            labels = ", ".join(arm.label for arm in plain)
            raise ValueError(f"{stability}, {fields}: is any of {labels}")
        return plain[0]

    def _fields(self, arm: ArmResult) -> dict[str, str]:
        run = self.folder.study.of(arm.variant)[0]
        pieces = [piece.partition("-") for piece in fields_of(arm.variant)[1:]]
        return {name: value for name, _, value in pieces} | run.axes

    def _runs(self, stability: str | None = None, **fields: str | None) -> list[Run]:
        arms = self.chosen(stability, **fields)
        return [run for arm in arms for run in self.folder.study.of(arm.variant)]

    def _rows(self, stability: str | None = None, **fields: str | None) -> list[Row]:
        variants = {arm.variant for arm in self.chosen(stability, **fields)}
        return [row for row in self.folder.rows if row["variant"] in variants]

    # ------------------------------------------------------------------ failures

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
        return [int(str(r["nonfinite_batches_after"])) for r in self._rows(stability, **fields)]

    def mean_batches(self, stability: str | None = None, **fields: str | None) -> float:
        """Their mean."""
        return fmean(self.batches(stability, **fields))

    def first(self, stability: str | None = None, **fields: str | None) -> list[int]:
        """The first non-finite step of every run that has one."""
        runs = self._runs(stability, **fields)
        return [min(run.nonfinite_steps) for run in runs if run.nonfinite_steps]

    def median_first(self, stability: str | None = None, **fields: str | None) -> float:
        """The median of the first ones."""
        return float(_of(median, self.first(stability, **fields)))

    def least_first(self, stability: str | None = None, **fields: str | None) -> int:
        """The earliest of them."""
        return int(_of(min, self.first(stability, **fields)))

    def greatest_miss(self, step: float, **fields: str | None) -> float:
        """How far the first non-finite step is from a step, at most, in steps."""
        return float(_of(max, [abs(first - step) for first in self.first(**fields)]))

    def lost_after_first(self, **fields: str | None) -> float:
        """Share of the steps from the first non-finite one on that are non-finite."""
        runs = [run for run in self._runs(**fields) if run.nonfinite_steps]
        left = sum(run.steps - min(run.nonfinite_steps) + 1 for run in runs)
        if not left:
            raise UndecidedError("no run is non-finite")
        return sum(len(run.nonfinite_steps) for run in runs) / left

    def outcomes(self, stability: str, outcome: str, **fields: str | None) -> int:
        """Runs of one outcome: clean, intermittent, collapsed, stopped."""
        return sum(arm.outcomes.get(outcome, 0) for arm in self.chosen(stability, **fields))

    def num_runs_of(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs of some arms."""
        return len(self._rows(stability, **fields))

    def median_grad_norm(self, stability: str | None = None, **fields: str | None) -> float:
        """The largest gradient norm of a run, median over those that went non-finite."""
        rows = [row for row in self._rows(stability, **fields) if row["first_nonfinite"]]
        return float(_of(median, [float(str(row["grad_norm_max"])) for row in rows]))

    def incidents(self, cause: str | None = None, module: str | None = None) -> int:
        """Runs with an incident of that cause, in a module whose path ends so."""
        found = [run.incident for run in self.folder.study.runs if run.incident]
        return sum(
            (cause is None or incident["cause"] == cause)
            and (module is None or str(incident["module"]).split(".")[-1] == module)
            for incident in found
        )

    # ------------------------------------------------------------------ against the baseline

    def _comparison(self, stability: str, endpoint: str, fields: Mapping[str, Any]) -> Comparison:
        arm = self.one(stability, **fields)
        if endpoint not in arm.comparisons:
            raise UndecidedError(f"{arm.label} is compared with nothing")
        return arm.comparisons[endpoint]

    def detected(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> int:
        """1 where the arm is told from chance as lower than its baseline."""
        found = self._comparison(stability, endpoint, fields)
        return int(found.detected and found.difference is not None and found.difference.mean < 0)

    def better(self, stability: str, **fields: str | None) -> int:
        """1 where its loss is lower, beyond chance."""
        return self.detected(stability, "loss", **fields)

    def worse(self, stability: str, **fields: str | None) -> int:
        """1 where its loss is higher, beyond chance."""
        found = self._comparison(stability, "loss", fields)
        return int(found.detected and found.difference is not None and found.difference.mean > 0)

    def fewer_detected(self, except_for: Sequence[str] = ()) -> int:
        """Arms whose failing seeds are fewer than their baseline's, beyond chance."""
        return sum(
            arm.comparisons["nonfinite"].detected
            and arm.nonfinite.events < (arm.baseline_nonfinite or arm.nonfinite).events
            for arm in self.arms
            if arm.comparisons and self._fields(arm)["stability"] not in except_for
        )

    def null_detected(self) -> int:
        """Endpoints in which a null arm stands out."""
        found = [c for arm in self.arms if arm.is_null for c in arm.comparisons.values()]
        return sum(c.p_value is not None and c.p_value <= ALPHA for c in found)

    def difference(self, stability: str, endpoint: str, **fields: str | None) -> float:
        """The arm's mean minus its baseline's, paired by seed."""
        found = self._comparison(stability, endpoint, fields).difference
        if found is None:
            raise UndecidedError(f"{stability} and its baseline share no seed with {endpoint}")
        return found.mean

    def interval(self, stability: str, endpoint: str, **fields: str | None) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        found = self._comparison(stability, endpoint, fields).difference
        if found is None:
            raise UndecidedError(f"{stability} and its baseline share no seed with {endpoint}")
        return found.low, found.high

    def p_value(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> float:
        """Adjusted over the arms of the study."""
        found = self._comparison(stability, endpoint, fields).p_value
        if found is None:
            raise UndecidedError(f"{endpoint} of {stability} could not be tested")
        return found

    def verdict(self, stability: str, endpoint: str = "nonfinite", **fields: str | None) -> str:
        """What the report says of it."""
        return self._comparison(stability, endpoint, fields).verdict

    def smallest_effect(self, stability: str, endpoint: str, **fields: str | None) -> float:
        """The smallest difference that the design finds 8 times of 10."""
        found = self._comparison(stability, endpoint, fields).smallest_effect
        if found is None:
            raise UndecidedError(f"no effect of {stability} on {endpoint} could be found")
        return found

    def share_interval(self, stability: str, **fields: str | None) -> str:
        """The difference in the share of failing seeds, with its 95 % interval, as text."""
        found = self._comparison(stability, "nonfinite", fields).difference
        if found is None:
            raise UndecidedError(f"{stability} could not be compared with its baseline")
        low, high = (digits.signed(end, 2) for end in (found.low, found.high))
        return f"{digits.signed(found.mean, 2)} ({low} to {high})"

    def batches_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """Non-finite batches of a run, mean over seeds with its 95 % interval, as text."""
        found = self.one(stability, **fields).nonfinite_batches
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} was finite until it acts")
        if found.low == found.high:
            return digits.fixed(found.mean, 0)
        return f"{digits.fixed(found.mean, 0)} ({digits.between(found.low, found.high, 0)})"

    def null_width(self, stability: str, endpoint: str = "nonfinite_batches") -> float:
        """From the least to the greatest difference that chance gave single runs."""
        found = self._comparison(stability, endpoint, {}).null_range
        if found is None:
            raise UndecidedError(f"{stability} has no range of chance")
        return found[1] - found[0]

    # ------------------------------------------------------------------ loss and the rest

    def mean_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Final validation loss of the seeds that stayed clean, in nats a token."""
        found = self.one(stability, **fields).loss
        if found is None:
            raise UndecidedError(f"no seed of {stability or fields} is clean")
        return found.mean

    def loss_interval(self, stability: str | None = None, **fields: str | None) -> str:
        """Its 95 % interval over seeds, as text."""
        found = self.one(stability, **fields).loss
        return "" if found is None else digits.between(found.low, found.high)

    def cache_bytes(self, stability: str | None = None, **fields: str | None) -> str:
        """Bytes of the cache that a token takes in decoding, as text."""
        return f"{int(str(self._rows(stability, **fields)[0]['cache_bytes_per_token'])):,}"

    def loss_gap(self, one: str, other: str) -> float:
        """By how much one option's mean loss is above another's, each at its own end."""
        return self.mean_loss(one) - self.mean_loss(other)

    def best_loss(self, options: str, **fields: str | None) -> float:
        """The lowest of the mean losses of several options."""
        return min(self.mean_loss(option, **fields) for option in options.split(","))

    def marked(self, stability: str | None = None, **fields: str | None) -> int:
        """Runs whose validation had windows without a finite loss."""
        return sum(arm.num_marked for arm in self.chosen(stability, **fields))

    def mean_spikes(self, stability: str | None = None, **fields: str | None) -> float:
        """Steps of a run that any definition calls a spike."""
        return fmean(len(run.spike_steps) for run in self._runs(stability, **fields))

    def max_violation(self, stability: str | None = None, **fields: str | None) -> float:
        """MaxVio over the last quarter of the run, mean over layers and runs."""
        return _mean(self._rows(stability, **fields), "max_violation")

    def mean_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """Training loss at the end, mean over the runs that have one."""
        return _mean(self._rows(stability, **fields), "train_loss")

    def greatest_train_loss(self, stability: str | None = None, **fields: str | None) -> float:
        """The same of the worst run; without bound where a run has none."""
        rows = self._rows(stability, **fields)
        return max(float(str(row["train_loss"] or math.inf)) for row in rows)

    def overfitting(self, stability: str | None = None, **fields: str | None) -> float:
        """By how much the last validation loss is above the best one; the least of any run."""
        rows = [row for row in self._rows(stability, **fields) if row["loss"] and row["best_loss"]]
        return float(_of(min, [float(str(r["loss"])) - float(str(r["best_loss"])) for r in rows]))

    def sensitivity(self, stability: str) -> float:
        """LR sensitivity of an option (arXiv 2309.14322), mean over seeds."""
        families = {family.label: family for family in rates.families(self.folder.study)}
        if stability not in families:
            raise UndecidedError(f"{stability} has too few rates; known: {', '.join(families)}")
        found = families[stability].sensitivity
        if found is None:
            raise UndecidedError(f"no seed of {stability} has every rate")
        return found.mean

    def cost(self) -> dict[str, float]:
        """What all runs that have ended took: steps, tokens, hours of one core."""
        rows = [row for row in self.folder.rows if row["seconds"]]
        own = sum(int(str(row["own_steps"])) for row in rows)
        shares = [int(str(r["own_steps"])) / max(1, int(str(r["steps"]))) for r in rows]
        seconds = [float(str(r["seconds"])) for r in rows]
        tokens = [int(str(r["tokens"])) for r in rows]
        return {
            "steps": own,
            "tokens": sum(t * s for t, s in zip(tokens, shares, strict=True)),
            "hours": sum(t * s for t, s in zip(seconds, shares, strict=True)) / 3600,
        }


def _fits(has: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    return all(has.get(name) == value for name, value in wanted.items())


def _of(function: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> Any:
    if not values:
        raise UndecidedError("no run has such a step or loss")
    return function(values)


def _mean(rows: Sequence[Row], column: str) -> float:
    return float(_of(fmean, [float(str(row[column])) for row in rows if row[column]]))
