"""Results that were made again beside those of the book: bit by bit, else by statistics."""

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
"""Columns that may differ where the same arithmetic was done: of the machine, or of other runs."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One study, made again."""

    num_runs: int
    """Of the book."""
    num_equal: int
    """Of these, bitwise the same in every figure."""
    missing: list[str]
    """Of these, not there again, or not finished."""
    apart: list[str]
    """Arms whose failing seeds or losses are told apart, after Holm over all arms."""
    differing: list[str]
    """Columns in which some run differs."""

    @property
    def agrees(self) -> bool:
        """Whether nothing is missing and no arm is told apart."""
        return not self.missing and not self.apart


def compare(name: str, committed: pd.DataFrame, again: pd.DataFrame) -> Comparison:
    """Runs by variant, seed and repeat.

    Args:
        name: of the study.
        committed: the book's results.csv.
        again: the same of the runs that were made anew.
    """
    old = {_key(row): row for row in committed.to_dict("records")}
    ended = {
        (run.variant, run.seed, run.repeat) for run in rebuilt(name, again).runs if has_ended(run)
    }
    # What was run besides, such as further seeds, is no part of the comparison.
    kept = [_key(row) in old and _key(row) in ended for row in again.to_dict("records")]
    again = again[kept]
    new = {_key(row): row for row in again.to_dict("records")}
    columns = {
        key: [c for c in row if c not in NOT_COMPARED and row[c] != new[key].get(c)]
        for key, row in old.items()
        if key in new
    }
    return Comparison(
        num_runs=len(old),
        num_equal=sum(not each for each in columns.values()),
        missing=["/".join(map(str, key)) for key in old if key not in new],
        apart=_apart(name, committed, again) if any(columns.values()) else [],
        differing=sorted({column for each in columns.values() for column in each}),
    )


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["variant"], row["seed"], row["repeat"]


def _apart(name: str, committed: pd.DataFrame, again: pd.DataFrame) -> list[str]:
    """Arms that another machine's rounding does not explain: Fisher and Welch, with Holm."""
    studies = rebuilt(name, committed), rebuilt(name, again)
    arms = [{arm.variant: arm for arm in arm_results(study)} for study in studies]
    p_values: dict[tuple[str, str], float] = {}
    for variant in arms[0].keys() & arms[1].keys():
        one, two = (each[variant] for each in arms)
        # What is the same, or has no seed, is no test and costs the others no power.
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
