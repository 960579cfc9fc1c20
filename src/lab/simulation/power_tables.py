"""`python -m src.lab power`: false findings, power and cost, by simulated studies."""

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import joblib

from src.cli.field_checks import given_path, number
from src.common import terminal
from src.common.number_format import fixed
from src.lab.simulation.simulated_study import Design, simulate
from src.study.analysis import power
from src.study.analysis.results import Proportion
from src.study.analysis.stats import ALPHA, wilson

NUM_ARMS = 10

FIXED = Design(
    name="fixed",
    num_arms=NUM_ARMS,
    num_seeds=20,
    num_untreated=4,
    is_sequential=False,
    stops=False,
)
"""Twenty seeds of a baseline, three A/A runs and ten arms, all trained to their end."""

SEQUENTIAL = Design(
    name="sequential",
    num_arms=NUM_ARMS,
    num_seeds=20,
    num_untreated=None,
    is_sequential=True,
    stops=True,
)

SHARES = (0.97, 0.7)
"""Shares of untreated runs that fail, for which false findings are counted."""

PREVENTED = (0.38, 0.5, 0.75)
"""Shares of the failures that one of the ten arms prevents, at the first of these shares."""

RESULTS = "power.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Simulated studies of one kind."""

    design: str
    share: float
    """The share of untreated runs that fail."""
    prevented: float
    """The share of these failures that one arm prevents; 0: no arm has an effect."""
    studies: int
    found: int
    """Studies in which that arm is found; without an effect, those in which any arm is."""
    runs: float
    """Mean number of runs."""
    cost: float
    """Mean cost, in complete runs."""

    @property
    def fixed_seeds(self) -> float | None:
        """The seeds with which the fixed design finds as much; None without an effect."""
        # The mean of Jeffreys' posterior: if all studies find the effect, the power need not be 1.
        found = (self.found + 0.5) / (self.studies + 1)
        return seeds_of_equal_power(found, self.share, self.prevented)

    @property
    def cost_ratio(self) -> float | None:
        """The cost, as a share of that of the fixed design with equal power."""
        seeds = self.fixed_seeds if self.prevented else FIXED.num_seeds
        assert FIXED.num_untreated is not None
        return None if seeds is None else self.cost / (seeds * (NUM_ARMS + FIXED.num_untreated))


def seeds_of_equal_power(found: float, share: float, prevented: float) -> float | None:
    """The number of seeds with which the fixed design has a power, between whole numbers."""
    assert FIXED.num_untreated is not None
    previous = 0.0
    for seeds in range(2, 41) if prevented else ():
        now = power.power(
            share=share,
            prevented=prevented,
            num_seeds=seeds,
            num_arm=1,
            num_untreated=FIXED.num_untreated,
            bound=ALPHA / NUM_ARMS,
            num_studies=10_000,
        )
        if now >= found:
            return seeds - 1 + (found - previous) / max(now - previous, 1e-9)
        previous = max(previous, now)
    return None


def power_command(given: Mapping[str, Any]) -> int:
    """Simulates the studies, prints both tables, and writes them if `out` is given."""
    studies = number(given, "studies", int, least=10)
    n_jobs = number(given, "n_jobs", int, least=1)
    out = None if given["out"] is None else given_path(given, "out")
    rows = list(_simulated(studies, n_jobs))
    show(rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / RESULTS).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
        terminal.say(f"written to {out / RESULTS}")
    return 0


def _simulated(studies: int, n_jobs: int) -> Iterator[Row]:
    kinds = [*((share, 0.0) for share in SHARES), *((SHARES[0], each) for each in PREVENTED)]
    with joblib.Parallel(n_jobs=n_jobs) as parallel:
        for design, (share, prevented) in itertools.product((FIXED, SEQUENTIAL), kinds):
            # A quarter is enough for the fixed design's power: nothing is computed from it.
            is_rough = prevented and not design.is_sequential
            count = max(10, studies // 4) if is_rough else studies
            effects = [prevented] + [0.0] * (NUM_ARMS - 1)
            outcomes = parallel(
                joblib.delayed(simulate)(design, effects, share, seed=seed) for seed in range(count)
            )
            yield Row(
                design=design.name,
                share=share,
                prevented=prevented,
                studies=count,
                found=sum(0 in o.found if prevented else bool(o.found) for o in outcomes),
                runs=fmean(o.num_runs for o in outcomes),
                cost=fmean(o.cost for o in outcomes),
            )
            terminal.say(f"{design.name}: {count} studies, {share:g} fail, {prevented:g} prevented")


def read(file: Path) -> list[Row]:
    """The rows that the command has written."""
    with file.open(encoding="utf-8", newline="") as stream:
        return [
            Row(
                design=row["design"],
                share=float(row["share"]),
                prevented=float(row["prevented"]),
                studies=int(row["studies"]),
                found=int(row["found"]),
                runs=float(row["runs"]),
                cost=float(row["cost"]),
            )
            for row in csv.DictReader(stream)
        ]


ERRORS = ["design", "untreated runs that fail", "studies", "with a false finding", "95 % interval"]
POWERS = ["design", "prevented", "found", "runs", "cost", "of the fixed design's at equal power"]


def errors(rows: Sequence[Row]) -> list[list[str]]:
    """False findings where no arm has an effect: the rows of a table with the columns ERRORS."""
    found = []
    for row in rows:
        if row.prevented == 0:
            low, high = wilson(Proportion(events=row.found, total=row.studies))
            share = f"{100 * row.found / row.studies:.1f} %"
            interval = f"{100 * low:.1f} to {100 * high:.1f} %"
            found.append([row.design, f"{row.share:g}", f"{row.studies:,}", share, interval])
    return found


def powers(rows: Sequence[Row]) -> list[list[str]]:
    """Power and cost where one arm has an effect, and cost where none has: columns POWERS."""
    found = []
    for row in rows:
        if row.share == SHARES[0]:
            power_found = f"{row.found / row.studies:.2f}" if row.prevented else ""
            is_fixed = row.design == FIXED.name
            ratio = "" if is_fixed or row.cost_ratio is None else fixed(row.cost_ratio, 2)
            effect = f"{100 * row.prevented:.0f} %" if row.prevented else "nothing"
            cost = [f"{row.runs:.0f}", f"{row.cost:.0f}"]
            found.append([row.design, effect, power_found, *cost, ratio])
    return found


def show(rows: Sequence[Row]) -> None:
    """Prints both tables."""
    terminal.table("false findings among ten arms without an effect", ERRORS, errors(rows))
    terminal.table("power for one of ten arms, and cost in complete runs", POWERS, powers(rows))
