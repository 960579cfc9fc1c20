"""What each remedy does to each failure: shares of damage undone, and what can be said of them."""

import contextlib
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from src.common import number_format
from src.common.override_grammar import parse_all
from src.config.compose import compose
from src.lab.book.select_arms import StudyArms, UndecidedError, statistic
from src.lab.remedies.effect import HELPS, Effect
from src.lab.remedies.failure_files import CONTROL, NONFINITE, NOTHING, Failure
from src.study.analysis.results import ArmResult, Comparison
from src.study.read.from_csv import steps_in

MARGIN = 0.1
"""Nats above the mean of the healthy runs from which a run counts as failing."""

MIN_FAILING, MAX_HEALTHY_FAILING = 0.6, 0.05
"""Admission: at least this share of the untreated runs fails, and at most that of healthy runs."""


class RemedyMatrix(StudyArms):
    """What page templates and predictions.yaml may ask about a study of failures."""

    def failure(self, name: str) -> Failure:
        """One failure by its name.

        Raises:
            UndecidedError: the study has no such failure.
        """
        for failure in self.folder.failures:
            if failure.name == name:
                return failure
        raise UndecidedError(f"{self.folder.name} has no failure {name}")

    def failures(self, shows_as: str | None = None) -> list[str]:
        """The names of the failures that have been run, without those that repeat another.

        Args:
            shows_as: only those that show as nonfinite, loss or nothing; None: nonfinite and loss.
        """
        return [
            failure.name
            for failure in self.folder.failures
            if (failure.shows_as != NOTHING if shows_as is None else failure.shows_as == shows_as)
            and failure.repeats is None
            and failure.name not in self.failures_to_come()
        ]

    def repeats(self) -> list[str]:
        """The names of the failures that have been run and repeat another."""
        return [
            failure.name
            for failure in self.folder.failures
            if failure.repeats is not None and failure.name not in self.failures_to_come()
        ]

    def failures_to_come(self) -> list[str]:
        """The names of the failures of study.yaml that have not been run yet."""
        return [
            failure.name
            for failure in self.folder.failures
            if self._variants[failure.name, False] not in self._run
        ]

    @cached_property
    def _run(self) -> set[str]:
        """The variants that have been run."""
        return set(self.folder.results["variant"])

    def seeds_to_come(self) -> list[str]:
        """The names of the failures that have been run with fewer seeds than planned."""
        return [
            name
            for name in [*self.failures(), *self.failures(NOTHING), *self.repeats()]
            if self._planned_seeds(name) - set(self.untreated(name)["seed"])
        ]

    def _planned_seeds(self, failure: str) -> set[int]:
        seeds = self.failure(failure).seeds or self.folder.plan["of_failures"]["seeds"]
        (parsed,) = parse_all([f"seed={seeds}"])
        return set(map(int, parsed.sweep_string_iterator()))

    def remedies(self) -> list[str]:
        """The remedies that were tried, in the order of study.yaml."""
        return list(self.folder.plan["of_failures"]["remedies"])

    @cached_property
    def _variants(self) -> dict[tuple[str, bool], str]:
        """The variants of the untreated and of the healthy runs, by failure."""
        found = {}
        for failure in self.folder.failures:
            for is_healthy in (False, True):
                more = failure.healthy if is_healthy else ()
                config = compose("train", [*failure.arguments, *more, "stability=none"])
                found[failure.name, is_healthy] = config.variant_name
        return found

    def _of(self, variant: str) -> pd.DataFrame:
        results = self.folder.results
        found = results[results["variant"] == variant]
        if found.empty:
            raise UndecidedError(f"{self.folder.name} has no run of {variant}")
        return found

    def untreated(self, failure: str) -> pd.DataFrame:
        """The rows of results.csv of the untreated runs with a failure."""
        return self._of(self._variants[failure, False])

    def healthy(self, failure: str) -> pd.DataFrame:
        """The rows of results.csv of the runs without the failure's cause."""
        return self._of(self._variants[failure, True])

    def arms_of(self, failure: str) -> dict[str, ArmResult]:
        """The arms with a failure, by remedy; the A/A control is one of them."""
        baseline = self._variants[failure, False]
        return {
            self.fields_of(arm)["stability"]: arm for arm in self.arms if arm.baseline == baseline
        }

    def _fails(self, failure: str, rows: pd.DataFrame) -> pd.Series:
        """Which runs fail, by the way in which the failure shows."""
        nonfinite = rows["nonfinite_steps"].fillna("").astype(str).str.len() > 0
        if self.failure(failure).shows_as == NONFINITE:
            return nonfinite
        bound = self.healthy(failure)["loss"].mean() + MARGIN
        return nonfinite | rows["loss"].isna() | (rows["loss"] > bound)

    def failing_share(self, failure: str) -> float:
        """The share of untreated runs that fail."""
        return float(self._fails(failure, self.untreated(failure)).mean())

    def healthy_failing_share(self, failure: str) -> float:
        """The share of runs without the failure's cause that fail."""
        return float(self._fails(failure, self.healthy(failure)).mean())

    def is_admitted(self, failure: str) -> bool:
        """Whether enough untreated runs fail, and hardly any without the cause."""
        return (
            self.failing_share(failure) >= MIN_FAILING
            and self.healthy_failing_share(failure) <= MAX_HEALTHY_FAILING
        )

    def admitted(self) -> list[str]:
        """The names of the failures that are admitted."""
        return [name for name in self.failures() if self.is_admitted(name)]

    def damage(self, failure: str) -> float:
        """What the failure costs: the share of failing runs, or nats of loss."""
        untreated, healthy = self.untreated(failure), self.healthy(failure)
        bad, good = self._badness(failure, untreated), self._badness(failure, healthy)
        return float(bad.mean() - good.mean())

    def _badness(self, failure: str, rows: pd.DataFrame) -> pd.Series:
        """Of each run, 1 if it fails, or its loss; if it has none, that of a uniform guess."""
        if self.failure(failure).shows_as == NONFINITE:
            return self._fails(failure, rows).astype(float)
        return rows["loss"].fillna(np.log(rows["vocab_size"].astype(float)))

    def _compared(self, failure: str, remedy: str) -> Comparison:
        arms = self.arms_of(failure)
        if remedy not in arms:
            raise UndecidedError(f"{remedy} was not tried on {failure}")
        endpoint = "nonfinite" if self.failure(failure).shows_as == NONFINITE else "loss"
        return arms[remedy].comparisons[endpoint]

    def effect(self, failure: str, remedy: str) -> Effect:
        """What a remedy does to a failure.

        Raises:
            UndecidedError: it was not tried on it, or has no finished run.
        """
        found = self._compared(failure, remedy)
        rows = self._of(self.arms_of(failure)[remedy].variant)
        if found.difference is None:
            raise UndecidedError(f"{remedy} has no run of {failure} that could be compared")
        is_nothing = self.failure(failure).shows_as == NOTHING
        # A share of the damage where there is one; a lower loss or fewer failures undo some of it.
        scale = 1.0 if is_nothing else -self._damage_compared(failure, remedy)
        ends = sorted(end / scale for end in (found.difference.low, found.difference.high))
        return Effect(
            remedy=remedy,
            undone=self.undone(failure, remedy),
            low=ends[0],
            high=ends[1],
            p_value=found.p_value,
            is_significant=found.detected,
            is_cost=is_nothing,
            num_failing=0 if is_nothing else int(self._fails(failure, rows).sum()),
            num_runs=len(rows),
        )

    def undone(self, failure: str, remedy: str, seeds: Sequence[int] | None = None) -> float:
        """The share of the damage that a remedy undoes; see Effect.

        Args:
            failure, remedy: their names.
            seeds: only these; None: all.
        """
        arms = self.arms_of(failure)
        if remedy not in arms:
            raise UndecidedError(f"{remedy} was not tried on {failure}")
        is_of_runs = self.failure(failure).shows_as == NONFINITE
        difference = self._compared(failure, remedy).difference
        if is_of_runs and seeds is None:
            # As the test counts: from the step on at which the remedy acts, A/A runs included.
            if difference is None:
                raise UndecidedError(f"{remedy} has no run of {failure} that could be compared")
            return -difference.mean / self._damage_compared(failure, remedy)
        treated, untreated = self._of(arms[remedy].variant), self.untreated(failure)
        if seeds is not None:
            treated = treated[treated["seed"].isin(seeds)]
        untreated = untreated[untreated["seed"].isin(set(treated["seed"]))]
        if is_of_runs:
            treated, untreated = _from_where_it_acts(treated, untreated)
        if treated.empty:
            raise UndecidedError(f"{remedy} has no run of {failure} with these seeds")
        if self.failure(failure).shows_as == NOTHING:
            return float(treated["loss"].mean() - untreated["loss"].mean())
        bad, healthy = self._badness(failure, untreated).mean(), self.healthy(failure)
        damage = float(bad - self._badness(failure, healthy).mean())
        return float(bad - self._badness(failure, treated).mean()) / damage

    def _damage_compared(self, failure: str, remedy: str) -> float:
        """The damage in the runs that a remedy is compared with.

        Raises:
            UndecidedError: there is none.
        """
        if self.failure(failure).shows_as != NONFINITE:
            return self.damage(failure)
        untreated = self.arms_of(failure)[remedy].untreated_nonfinite
        if untreated is None or not untreated.events:
            raise UndecidedError(f"no untreated run of {failure} fails where {remedy} acts")
        return untreated.events / untreated.total - self.healthy_failing_share(failure)

    def effects(self, failure: str, verdict: str | None = None) -> list[Effect]:
        """The effects of all remedies that could be compared, the most helpful first.

        Others are left out: averaged weights, for example, change no step, so that their failures
        are the baseline's.

        Args:
            failure: its name.
            verdict: only those with this verdict.
        """
        found = self._effects(failure)
        return [e for e in found if verdict in (None, e.verdict)]

    def _effects(self, failure: str) -> list[Effect]:
        # A page asks for them hundreds of times.
        if failure not in self._known_effects:
            found = []
            for name in self.arms_of(failure):
                if name != CONTROL:
                    with contextlib.suppress(UndecidedError):
                        found.append(self.effect(failure, name))
            found.sort(key=lambda effect: -effect.benefit)
            self._known_effects[failure] = found
        return self._known_effects[failure]

    @cached_property
    def _known_effects(self) -> dict[str, list[Effect]]:
        return {}

    def cell(self, failure: str, remedy: str) -> str:
        """The effect as text in a table: per cent of the damage undone, bold if significant."""
        try:
            effect = self.effect(failure, remedy)
        except UndecidedError:
            return number_format.NONE
        if self.failure(failure).shows_as == NOTHING:
            text = number_format.signed(effect.undone)
        else:
            text = f"{number_format.fixed(100 * effect.undone, 0)} %"
        return f"**{text}**" if effect.is_significant else text

    def most_undone(self, failure: str, except_for: Sequence[str] = ()) -> float:
        """The greatest share of the damage that any remedy undoes, leaving out some."""
        found = [e.undone for e in self.effects(failure) if e.remedy not in except_for]
        return float(statistic(max, found))

    def greatest_cost(self, except_for: Sequence[str] = ()) -> float:
        """The greatest increase in loss by any remedy where nothing is broken, in nats."""
        costs = [self.most_undone(name, except_for) for name in self.failures(NOTHING)]
        return float(statistic(max, costs))

    def most_failures_helped(self) -> int:
        """The number of failures that the most versatile remedy helps against."""
        return max(map(self.num_helpful, self.remedies()))

    def noticed(self, failure: str) -> str:
        """Which instruments noticed the failure, and in how many untreated and healthy runs."""
        instruments = {
            "guard": lambda rows: rows["first_nonfinite"].notna(),
            "early warning": lambda rows: rows["alarm_step"].notna(),
            "spike watch": lambda rows: rows["spikes"] > 0,
        }
        found = []
        for name, sees in instruments.items():
            counts = [
                int(sees(rows).sum()) for rows in (self.untreated(failure), self.healthy(failure))
            ]
            if counts[0]:
                found.append(f"{name} {counts[0]} ({counts[1]})")
        return ", ".join(found) or "none"

    def num_helpful(self, remedy: str) -> int:
        """The number of failures that a remedy helps against."""
        return sum(
            effect.remedy == remedy
            for name in self.failures()
            for effect in self.effects(name, HELPS)
        )


def _from_where_it_acts(
    treated: pd.DataFrame, untreated: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both without the seeds on which a run had failed before the remedy began to act."""
    start = max(treated["acts_from"], default=0)

    def early(rows: pd.DataFrame) -> set[int]:
        first = [min(steps_in(text), default=math.inf) for text in rows["nonfinite_steps"]]
        return {seed for seed, step in zip(rows["seed"], first, strict=True) if step <= start}

    gone = early(treated) | early(untreated)
    return treated[~treated["seed"].isin(gone)], untreated[~untreated["seed"].isin(gone)]
