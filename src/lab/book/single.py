"""A run that is too large for a study over seeds: its curve and its incident in the book."""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import yaml

from src.common.errors import InputError, damaged
from src.common.override_grammar import file_arguments
from src.common.run_folder import read_json
from src.config.compose import compose
from src.lab.book.files import RESULTS_FILE, BookFolder
from src.lab.book.select_arms import UndecidedError
from src.study.read.collect import Run, collect
from src.training.recipe import RecipeConfig

RUN_FILE = "run.yaml"
"""The file with the arguments of the run."""

INCIDENT, FIGURE = "incident.json", "figures/curve.svg"

ADVICE = "restore it from git"
"""Advice if a file of the book cannot be read."""

COLUMNS = {
    "loss": "train/loss",
    "grad_norm": "grad/norm",
    "nonfinite_batches": "guard/nonfinite_loss",
    "norms_over_100": "spike/norm_over_100",
    "step_seconds": "speed/step_seconds",
}
"""The columns of the curve and their metrics."""

LAYERS = {"bias_mean": min, "picked_logit_min": min, "topk_sum_min": min, "max_violation": max}
"""Columns that are the minimum or maximum over the routers of all layers."""


class SingleRun(BookFolder):
    """The folder of a single run in the book."""

    @cached_property
    def arguments(self) -> list[str]:
        """The arguments of `python -m src.train`.

        Raises:
            InputError: run.yaml is damaged, or its run belongs to another study.
        """
        file = self.folder / RUN_FILE
        with damaged(file, advice=ADVICE):
            given = yaml.safe_load(file.read_text(encoding="utf-8"))["arguments"]
        if not isinstance(given, list) or f"study={self.name}" not in given:
            raise InputError(f"{file}: arguments must be a list that contains study={self.name}")
        return file_arguments([str(argument) for argument in given], where=str(file))

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """The logged steps.

        Raises:
            InputError: results.csv is damaged.
            UndecidedError: the run has not been made.
        """
        if not self.has_results:
            raise UndecidedError(f"{self.name} has not been run")
        with damaged(self.folder / RESULTS_FILE, advice=ADVICE):
            rows = [
                {name: float(value) for name, value in row.items() if value is not None}
                for row in self.results.to_dict("records")
            ]
            if not rows or not all("step" in row for row in rows):
                raise ValueError("no steps")
            return rows

    @cached_property
    def incident(self) -> Mapping[str, Any] | None:
        """The first non-finite incident; None if there was none.

        Raises:
            InputError: incident.json is damaged.
        """
        file = self.folder / INCIDENT
        with damaged(file, advice=ADVICE):
            found = read_json(file)
            fields = "step", "cause", "line", "figures"
            return None if found is None else {name: found[name] for name in fields}

    @cached_property
    def recipe(self) -> RecipeConfig:
        """The run's recipe."""
        # The machine does not matter: nothing is trained.
        return compose("train", [*self.arguments, "trainer=cpu"]).recipe

    @cached_property
    def words(self) -> dict[str, Any]:
        """The names that its predictions and page may use; unknown values are None."""
        # The first step includes compilation.
        seconds = [row["step_seconds"] for row in self.curve[1:] if "step_seconds" in row]
        return {
            "command": f"python -m src.train {' '.join(self.arguments)}",
            "steps": self.recipe.max_steps,
            "last_step": int(self.curve[-1]["step"]),
            "failed": int(self.incident is not None),
            "first_nonfinite": self.first_nonfinite,
            "by_router_underflow": int((self.incident or {}).get("cause") == "router underflow"),
            "grad_norm_before": self.grad_norm_before(),
            "grad_norm_after_warmup": self.grad_norm_before(after=self.recipe.warmup_steps),
            "step_seconds": seconds,
            "median_seconds": median(seconds) if seconds else None,
            "least_max_violation": self.least_max_violation(),
            "incident": self.incident,
            "at": self.at,
            "last": self.curve[-1],
        }

    @property
    def first_nonfinite(self) -> int | None:
        """The step of the first non-finite incident."""
        return None if self.incident is None else int(self.incident["step"])

    def grad_norm_before(self, *, after: int = 0) -> float | None:
        """The largest gradient norm of a logged step before the incident."""
        end = self.first_nonfinite or self.curve[-1]["step"] + 1
        rows = [row for row in self.curve if after < row["step"] < end]
        return max((row["grad_norm"] for row in rows if "grad_norm" in row), default=None)

    def least_max_violation(self) -> float | None:
        """The lowest MaxVio of the worst router over the logged steps after the first."""
        # In the first step a multiplied bias is 0 and so are all logits: ties decide the routing.
        rows = self.curve[1:]
        return min((row["max_violation"] for row in rows if "max_violation" in row), default=None)

    def at(self, step: int) -> Mapping[str, float]:
        """The last logged step up to a given step."""
        return [row for row in self.curve if row["step"] <= step][-1]


def import_run(single: SingleRun, runs: Path) -> None:
    """Copies the curve and the first incident of a run into the book.

    Raises:
        InputError: there is no such run, or more than one.
    """
    study = collect(runs, single.name)
    if len(study.runs) != 1:
        raise InputError(
            f"studies={single.name}: {study.folder} must have one run, has {len(study.runs)}"
        )
    (run,) = study.runs
    # Statistics of gradients and activations are also logged at other steps.
    lines = [_row(line) for line in run.lines if COLUMNS["step_seconds"] in line]
    curve = pd.DataFrame(lines, columns=["step", *COLUMNS, *LAYERS], dtype=object)
    curve.to_csv(single.folder / RESULTS_FILE, index=False)
    (single.folder / INCIDENT).unlink(missing_ok=True)
    if (first := _first_nonfinite(run)) is not None:
        shutil.copyfile(first, single.folder / INCIDENT)


def _first_nonfinite(run: Run) -> Path | None:
    """The file of the first incident that is not just a spike."""
    files = run.folder.glob("incidents/step-*/incident.json")
    steps = {}
    for file in files:
        with damaged(file):
            incident = read_json(file) or {}
            if incident["kind"] == "non-finite":
                steps[file] = int(incident["step"])
    return min(steps, key=lambda file: steps[file], default=None)


def _row(line: Mapping[str, float]) -> dict[str, float]:
    row: dict[str, float] = {"step": int(line["step"])}
    row |= {column: line[metric] for column, metric in COLUMNS.items() if metric in line}
    for column, pick in LAYERS.items():
        values = [v for k, v in line.items() if k.startswith("moe/") and k.endswith(f"/{column}")]
        row |= {column: pick(values)} if values else {}
    return row


def single_runs(book: Path) -> dict[str, SingleRun]:
    """The single runs of a book, by name."""
    return {
        file.parent.name: SingleRun(folder=file.parent)
        for file in sorted(book.glob(f"*/{RUN_FILE}"))
    }
