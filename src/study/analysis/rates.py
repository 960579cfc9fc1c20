"""Failures and loss against learning rate: how much do they depend on it?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from src.common import number_format
from src.common.record import frac_metric
from src.study.analysis import stats
from src.study.analysis.arms import labels
from src.study.analysis.endpoints import Window, by_seed
from src.study.read.collect import Run, Study
from src.study.report.table import Cell, Column, Table, cell

FEWEST = 3
"""From this number of rates on, a report shows how the loss depends on the rate."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Variants that differ only in the learning rate."""

    label: str
    runs: Mapping[float, Sequence[Run]]
    """The runs that have ended, by rate, lowest rate first."""
    is_complete: bool
    """Whether every rate has a run that has ended."""
    ceiling: float
    """Loss of a uniform guess, ln(vocabulary), in nats per token: the loss before training."""

    @property
    def rates(self) -> list[float]:
        """The learning rates, lowest first."""
        return list(self.runs)

    def loss(self, run: Run) -> float:
        """Final loss, capped at the ceiling. A run without a final loss counts as the ceiling."""
        final = final_loss(run)
        return self.ceiling if final is None else min(final, self.ceiling)

    def mean_loss(self, rate: float) -> float:
        """Mean over the runs of a rate."""
        return fmean(self.loss(run) for run in self.runs[rate])

    @property
    def best(self) -> float:
        """The rate with the lowest mean loss."""
        return min(self.rates, key=self.mean_loss)

    @cached_property
    def sensitivity(self) -> stats.Estimate | None:
        """LR sensitivity over the seeds that have every rate; None if there are none.

        Raises:
            ValueError: the rates are not evenly spaced on a log scale.
        """
        seeds = {rate: by_seed(runs) for rate, runs in self.runs.items()}
        shared = set.intersection(*(set(each) for each in seeds.values()))
        found = []
        for seed in sorted(shared):
            losses = {
                rate: fmean(self.loss(run) for run in each[seed]) for rate, each in seeds.items()
            }
            value = stats.lr_sensitivity(losses, initial_loss=self.ceiling)
            found += [] if value is None else [value]
        return stats.interval(found)


def final_loss(run: Run) -> float | None:
    """The final loss; None if the run collapsed or a validation window was not finite."""
    metric = run.loss_metric
    if run.outcome not in ("clean", "intermittent") or (run.final(frac_metric(metric)) or 0) > 0:
        return None
    return run.final(metric)


def families(study: Study) -> list[Family]:
    """All families with enough rates, in the order of the sweep."""
    grouped: dict[str, dict[float, list[Run]]] = {}
    for run in study.runs:
        fields = run.variant.split("@")
        name = "@".join(f for f in fields if not f.partition("-")[0].endswith("learning_rate"))
        rate = float(run.config["recipe"]["learning_rate"])
        grouped.setdefault(name, {}).setdefault(rate, []).append(run)
    swept = {name: rates for name, rates in grouped.items() if len(rates) >= FEWEST}
    names = labels({name: next(iter(rates.values()))[0] for name, rates in swept.items()})
    found = []
    for name, rates in swept.items():
        ended = {
            rate: [run for runs in by_seed(rates[rate]).values() for run in runs]
            for rate in sorted(rates)
        }
        ended = {rate: runs for rate, runs in ended.items() if runs}
        # All runs share one tokenizer. Early records do not say how many tokens it has.
        sizes = [run.record.get("vocab_size", 0) for runs in ended.values() for run in runs]
        if len(ended) >= FEWEST and all(sizes):
            family = Family(
                label=names[name],
                runs=ended,
                is_complete=len(ended) == len(rates),
                ceiling=math.log(max(sizes)),
            )
            found.append(family)
    return found


def sensitivity_table(found: Sequence[Family], *, title: str) -> Table:
    """One row per family."""
    return Table(
        title=title,
        columns=[
            Column(name="arm", is_text=True),
            Column(name="rates"),
            Column(
                name="non-finite runs",
                note="over the whole run, for each rate from the lowest to the highest",
            ),
            Column(
                name="best rate",
                note="the rate with the lowest mean loss; if it is at the end of the grid, a better"
                " rate may lie beyond",
            ),
            Column(name="val/loss at best rate"),
            Column(
                name="LR sensitivity",
                note="mean final loss over the rates minus the lowest one, per seed, in nats per"
                " token: mean over seeds and 95 % interval (arXiv 2309.14322). A run counts as a"
                " uniform guess if it collapsed, was stopped or had non-finite validation windows",
            ),
        ],
        rows=[_row(family) for family in found],
    )


def _row(family: Family) -> list[Cell]:
    low, high = family.rates[0], family.rates[-1]
    try:
        value, why = family.sensitivity, "no seed has every rate"
    except ValueError:
        value, why = None, "rates are not evenly spaced on a log scale"
    if not family.is_complete:
        value, why = None, "some rate has no run that has ended"
    shown = cell(number_format.NONE, why)
    if value is not None:
        interval = number_format.between(value.low, value.high) if value.low != value.high else ""
        shown = cell(number_format.fixed(value.mean), interval)
    failing = ", ".join(_failing(family.runs[rate]) for rate in family.rates)
    best = family.mean_loss(family.best)
    none = best >= family.ceiling
    return [
        Cell(family.label),
        cell(f"{len(family.rates)}", f"{low:g} to {high:g}"),
        Cell(failing),
        Cell(number_format.NONE)
        if none
        else cell(f"{family.best:g}", "" if low < family.best < high else "at the end of the grid"),
        Cell(number_format.NONE if none else number_format.fixed(best)),
        shown if not none else cell(number_format.NONE, "no rate has a loss"),
    ]


def _failing(runs: Sequence[Run]) -> str:
    seeds = by_seed(runs)
    window = Window(start=0, end=max(run.max_steps for run in runs))
    failed = window.proportion(seeds)
    return f"{failed.events} of {failed.total}"
