"""One run that is too large for a study over seeds: its curve and its incident, beside its page."""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from src.config import compose
from src.errors import InputError
from src.laboratory.chosen import UndecidedError
from src.study.collect import Run, collect
from src.training.recipe import RecipeConfig

RUN_FILE = "run.yaml"
"""Holds the arguments of the run."""

CURVE, INCIDENT, FIGURE = "results.csv", "incident.json", "figures/curve.svg"

COLUMNS = {
    "loss": "train/loss",
    "grad_norm": "grad/norm",
    "nonfinite_batches": "guard/nonfinite_loss",
    "norms_over_100": "spike/norm_over_100",
    "step_seconds": "speed/step_seconds",
}
"""Columns of the curve and the metrics that they are."""

LAYERS = {"bias_mean": min, "picked_logit_min": min, "topk_sum_min": min, "max_violation": max}
"""Columns that are taken over the routers of all layers."""


@dataclass(frozen=True, kw_only=True)
class SingleRun:
    """What its folder in the book has."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the run, which is that of its folder."""
        return self.folder.name

    @property
    def has_results(self) -> bool:
        """Whether anything of it has been run."""
        return (self.folder / CURVE).is_file()

    @cached_property
    def arguments(self) -> list[str]:
        """What is typed after `python -m src.train`.

        Raises:
            InputError: run.yaml is damaged, or makes the run of another study.
        """
        file = self.folder / RUN_FILE
        with _readable(file):
            given = yaml.safe_load(file.read_text(encoding="utf-8"))["arguments"]
        if not isinstance(given, list) or f"study={self.name}" not in given:
            raise InputError(f"{file}: arguments must be a list with study={self.name} in it")
        return [str(argument) for argument in given]

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """The logged steps.

        Raises:
            InputError: results.csv is damaged.
            UndecidedError: it has not been run.
        """
        if not self.has_results:
            raise UndecidedError(f"{self.name} has not been run")
        file = self.folder / CURVE
        with _readable(file):
            text = file.read_text(encoding="utf-8").splitlines()
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(text)]
            if not rows or not all("step" in row for row in rows):
                raise ValueError("no steps")
            return rows

    @cached_property
    def incident(self) -> Mapping[str, Any] | None:
        """The first that was not finite.

        Raises:
            InputError: incident.json is damaged.
        """
        file = self.folder / INCIDENT
        if not file.is_file():
            return None
        with _readable(file):
            found = json.loads(file.read_text(encoding="utf-8"))
            return {name: found[name] for name in ("step", "cause", "line", "figures")}

    @cached_property
    def recipe(self) -> RecipeConfig:
        """How it trains."""
        # On no machine in particular: nothing is trained.
        return compose("train", [*self.arguments, "trainer=cpu"]).recipe

    @cached_property
    def words(self) -> dict[str, Any]:
        """What its predictions and pages may say; None is what cannot be said of it."""
        seconds = [row["step_seconds"] for row in self.rows[1:] if "step_seconds" in row]
        return {
            "command": f"python -m src.train {' '.join(self.arguments)}",
            "steps": self.recipe.max_steps,
            "last_step": int(self.rows[-1]["step"]),
            "failed": int(self.incident is not None),
            "first_nonfinite": self.first_nonfinite,
            "by_router_underflow": int((self.incident or {}).get("cause") == "router underflow"),
            "grad_norm_before": self.grad_norm_before(),
            "grad_norm_after_warmup": self.grad_norm_before(after=self.recipe.warmup_steps),
            "step_seconds": sorted(seconds),
            "incident": self.incident,
            "at": self.at,
            "last": self.rows[-1],
        }

    @property
    def first_nonfinite(self) -> int | None:
        """Step of the incident."""
        return None if self.incident is None else int(self.incident["step"])

    def grad_norm_before(self, *, after: int = 0) -> float | None:
        """The largest gradient norm of a logged step before the incident."""
        end = self.first_nonfinite or self.rows[-1]["step"] + 1
        rows = [row for row in self.rows if after < row["step"] < end]
        return max((row["grad_norm"] for row in rows if "grad_norm" in row), default=None)

    def at(self, step: int) -> Mapping[str, float]:
        """The last logged step up to one."""
        return [row for row in self.rows if row["step"] <= step][-1]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, csv.Error, yaml.YAMLError) as error:
        raise InputError(f"{file}: is damaged ({type(error).__name__}: {error})") from error


def bring(single: SingleRun, runs: Path) -> None:
    """Takes the curve and the first incident of a run into the book.

    Raises:
        InputError: there is no such run, or more than one.
    """
    study = collect(runs, single.name)
    if len(study.runs) != 1:
        raise InputError(
            f"studies={single.name}: {study.folder} must hold one run, holds {len(study.runs)}"
        )
    (run,) = study.runs
    metrics: dict[int, dict[str, float]] = {}
    for line in run.lines:
        metrics.setdefault(int(line["step"]), {}).update(line)
    with (single.folder / CURVE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *COLUMNS, *LAYERS], lineterminator="\n")
        writer.writeheader()
        # A router's figures may come more often than the others.
        logged = (each for each in sorted(metrics.items()) if COLUMNS["step_seconds"] in each[1])
        writer.writerows(_row(step, line) for step, line in logged)
    (single.folder / INCIDENT).unlink(missing_ok=True)
    if (first := _first_nonfinite(run)) is not None:
        shutil.copyfile(first, single.folder / INCIDENT)


def _first_nonfinite(run: Run) -> Path | None:
    """The file of the first incident that is no mere spike."""
    files = run.folder.glob("incidents/step-*/incident.json")
    found = {file: json.loads(file.read_text(encoding="utf-8")) for file in files}
    nonfinite = [file for file, incident in found.items() if incident["kind"] == "non-finite"]
    return min(nonfinite, key=lambda file: int(found[file]["step"]), default=None)


def _row(step: int, line: Mapping[str, float]) -> dict[str, float]:
    row: dict[str, float] = {"step": step}
    row |= {column: line[metric] for column, metric in COLUMNS.items() if metric in line}
    for column, pick in LAYERS.items():
        values = [v for k, v in line.items() if k.startswith("moe/") and k.endswith(f"/{column}")]
        row |= {column: pick(values)} if values else {}
    return row


def single_runs(book: Path) -> dict[str, SingleRun]:
    """Those of a book, by name."""
    return {
        file.parent.name: SingleRun(folder=file.parent)
        for file in sorted(book.glob(f"*/{RUN_FILE}"))
    }
