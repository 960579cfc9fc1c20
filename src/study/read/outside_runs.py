"""Runs that were made elsewhere, from a CSV file or from MLflow: arm, seed and value."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.common import terminal
from src.common.errors import InputError, nearest

LARGEST = 1.79e308
"""MLflow's databases hold infinity as the largest number."""

YES, NO = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}


@dataclass(frozen=True, kw_only=True)
class OutsideRun:
    """One run: its arm, its seed, and the value of the endpoint."""

    arm: str
    seed: str
    value: float | None
    """None if the run has no finite value, so that it failed."""


@dataclass(frozen=True, kw_only=True)
class OutsideStudy:
    """The runs of a table."""

    name: str
    endpoint: str
    """The column or metric of the values."""
    runs: list[OutsideRun]
    is_failure: bool
    """Whether the values say if a run failed: all are yes or no, 1 or 0."""

    @property
    def arms(self) -> list[str]:
        """The arms in order of appearance."""
        return list(dict.fromkeys(run.arm for run in self.runs))


def from_csv_file(path: Path, *, arm: str, seed: str, endpoint: str) -> OutsideStudy:
    """The runs of a CSV file with a line per run.

    Args:
        path: the file.
        arm: the column that names the arm.
        seed: the column of the seed; runs of one seed are compared with each other.
        endpoint: the column of the values. An empty or non-finite one is a run that failed.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    try:
        # Without index_col a comma at the end of lines would shift all columns.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"csv={path}: cannot be read ({error})") from error
    for field, column in (("arm", arm), ("seed", seed), ("endpoint", endpoint)):
        if column not in table:
            hint = nearest(column, table.columns)
            raise InputError(
                f"{field}={column}: no such column; {hint}columns: {', '.join(table.columns)}"
            )
    rows = zip(table[arm], table[seed], table[endpoint], strict=True)
    return _study(path.stem, endpoint, rows, source=f"csv={path}")


def from_mlflow(
    runs: list[dict[str, Any]], *, name: str, arm: str, seed: str, endpoint: str
) -> OutsideStudy:
    """The finished and failed runs of an MLflow experiment.

    Args:
        runs: each with `metrics`, `params` and `tags`.
        name: the experiment.
        arm: a param or tag that names the arm.
        seed: a param or tag with the seed.
        endpoint: a metric, or a param or tag. A run without it failed.

    Raises:
        InputError: no run has the arm, the seed or the endpoint.
    """
    texts = [{**run["tags"], **run["params"]} for run in runs]
    everything = [run["metrics"] | text for text, run in zip(texts, runs, strict=True)]
    for field, key, places in (
        ("arm", arm, texts),
        ("seed", seed, texts),
        ("endpoint", endpoint, everything),
    ):
        if not any(key in values for values in places):
            known = sorted({k for values in places for k in values if "mlflow." not in k})
            hint = nearest(key, known)
            raise InputError(
                f"{field}={key}: no run of {name} has it; {hint}known: {', '.join(known)}"
            )
    rows = [
        (str(text[arm]), str(text[seed]), str(run["metrics"].get(endpoint, text.get(endpoint, ""))))
        for text, run in zip(texts, runs, strict=True)
        if arm in text and seed in text
    ]
    if len(rows) < len(runs):
        terminal.warn(
            f"{len(runs) - len(rows)} runs of {name} without {arm} or {seed} are left out"
        )
    return _study(name, endpoint, iter(rows), source=f"mlflow={name}")


def _study(
    name: str, endpoint: str, rows: Iterator[tuple[str, str, str]], *, source: str
) -> OutsideStudy:
    runs, texts = [], []
    for number, (arm, seed, text) in enumerate(rows, start=1):
        if not arm.strip() or not seed.strip():
            raise InputError(f"{source}: run {number} has no {'seed' if arm.strip() else 'arm'}")
        text = text.strip()
        texts.append(text.lower())
        runs.append(OutsideRun(arm=arm.strip(), seed=seed.strip(), value=_value(text, endpoint)))
    if not runs:
        raise InputError(f"{source}: holds no run")
    known = [text for text in texts if text]
    is_failure = bool(known) and all(text in YES | NO for text in known)
    return OutsideStudy(name=name, endpoint=endpoint, runs=runs, is_failure=is_failure)


def _value(text: str, endpoint: str) -> float | None:
    if text.lower() in YES | NO:
        return float(text.lower() in YES)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"endpoint={endpoint}: {text} is neither a number nor yes or no") from None
    return value if math.isfinite(value) and abs(value) < LARGEST else None
