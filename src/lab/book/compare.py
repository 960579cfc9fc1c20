"""Compares rerun results with those of the book: bitwise, and by statistics if they differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats as scipy_stats

from src.study.analysis.analyse import arm_results
from src.study.analysis.endpoints import by_seed, clean_loss, has_ended, seed_means
from src.study.analysis.stats import ALPHA, fisher, holm
from src.study.read.from_csv import rebuilt

NOT_COMPARED = ("seconds", "git_sha", "code", "torch", "device", "label", "varied")
"""Columns that may differ between equal runs: they depend on the machine or on other runs."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of one study with its rerun."""

    num_runs: int
    """The number of runs in the book."""
    num_equal: int
    """How many of them are bitwise equal in every value."""
    missing: list[str]
    """The runs of the book that were not rerun or have not ended."""
    different_arms: list[str]
    """Arms whose failing seeds or losses differ significantly, after Holm over all arms."""
    differing: list[str]
    """Columns in which some run differs."""

    @property
    def agrees(self) -> bool:
        """Whether no run is missing and no arm differs significantly."""
        return not self.missing and not self.different_arms


def compare(name: str, committed: pd.DataFrame, rerun: pd.DataFrame) -> Comparison:
    """Compares runs by variant, seed and repeat.

    Args:
        name: the study's name.
        committed: the book's results.csv.
        rerun: the same frame from the rerun.
    """
    old = {_key(row): row for row in committed.to_dict("records")}
    ended = {
        (run.variant, run.seed, run.repeat) for run in rebuilt(name, rerun).runs if has_ended(run)
    }
    # Runs that the book does not have, such as further seeds, are not compared.
    kept = [_key(row) in old and _key(row) in ended for row in rerun.to_dict("records")]
    rerun = rerun[kept]
    new = {_key(row): row for row in rerun.to_dict("records")}
    columns = {
        key: [c for c in row if c not in NOT_COMPARED and row[c] != new[key].get(c)]
        for key, row in old.items()
        if key in new
    }
    return Comparison(
        num_runs=len(old),
        num_equal=sum(not each for each in columns.values()),
        missing=["/".join(map(str, key)) for key in old if key not in new],
        different_arms=_different_arms(name, committed, rerun) if any(columns.values()) else [],
        differing=sorted({column for each in columns.values() for column in each}),
    )


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["variant"], row["seed"], row["repeat"]


def _different_arms(name: str, committed: pd.DataFrame, rerun: pd.DataFrame) -> list[str]:
    """Arms that differ by more than rounding explains: Fisher and Welch, with Holm."""
    studies = rebuilt(name, committed), rebuilt(name, rerun)
    arms = [{arm.variant: arm for arm in arm_results(study)} for study in studies]
    p_values: dict[tuple[str, str], float] = {}
    for variant in arms[0].keys() & arms[1].keys():
        one, two = (each[variant] for each in arms)
        # Equal values and empty arms are not tested, so they cost the others no power.
        if one.nonfinite != two.nonfinite and one.nonfinite.total and two.nonfinite.total:
            p_values[one.label, "failing seeds"] = fisher(one.nonfinite, two.nonfinite)
        losses = [
            seed_means(by_seed(s.of(variant)), lambda run: clean_loss(run, step=run.steps))
            for s in studies
        ]
        if min(map(len, losses)) > 1 and losses[0] != losses[1]:
            p_values[one.label, "loss"] = float(
                scipy_stats.ttest_ind(*losses, equal_var=False).pvalue
            )
    adjusted = holm(p_values)
    return sorted(f"{label} ({what})" for (label, what), p in adjusted.items() if p <= ALPHA)
