"""Writes frames to CSV files, reads them, and rebuilds a study from the frame of its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from src.common.record import frac_metric, tokens_metric
from src.study.analysis.frames import Row
from src.study.read.collect import Run, Study

AXES = ("attention", "ffn", "model", "preset")

TEXTS = (
    "variant",
    "label",
    "varied",
    "nonfinite_steps",
    "spike_steps",
    "validations",
    "config_hash",
    "git_sha",
    "code",
    "torch",
)
"""Columns that stay text even if a value looks like a number."""


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Writes one line per row, in full precision; unknown values are empty."""
    frame.to_csv(path, index=False, lineterminator="\r\n")


def read_frame(path: Path) -> pd.DataFrame:
    """Reads what `write_frame` wrote: integers, floats, text, and None for an empty field.

    Raises:
        ValueError: the file is not a table.
    """
    texts = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = {
        name: [_value(text, is_text=name in TEXTS) for text in texts[name]] for name in texts
    }
    return pd.DataFrame(columns, dtype=object)


def _value(text: str, *, is_text: bool) -> str | int | float | None:
    if not text or is_text:
        return text or None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, kw_only=True)
class RowRun(Run):
    """A run of which only its row is known: all that statistics need, and its validations."""

    row: Row

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        """The validations only."""
        metric = self.row["loss_metric"]
        found = []
        for text in (self.row["validations"] or "").split():
            step, loss, frac, *tokens = text.split(":")
            line = {"step": float(step), frac_metric(metric): float(frac)}
            line |= {tokens_metric(metric): float(share) for share in tokens}
            found.append(line | ({metric: float(loss)} if loss else {}))
        return found


def rebuilt(name: str, runs: pd.DataFrame) -> Study:
    """The study of a frame of runs; its statistics are those of the original study.

    Args:
        name: the study's name.
        runs: the frame, from `runs_frame` or `read_frame`.
    """
    rows = runs.to_dict("records")
    found: list[Run] = [_run(row) for row in rows]
    return Study(name=name, folder=Path(name), runs=found, sweeps=[], looks=_looks(rows))


def _looks(rows: Sequence[Row]) -> dict[str, list[list[int]]]:
    """The looks of each variant of a sequential study, as far as any run has reached them.

    An arm may have ended before its last look, but its baseline has not while others went on.
    """
    new: dict[str, dict[int, set[int]]] = {}
    for row in rows:
        # Results of earlier versions have no such column.
        if row.get("look") is not None:
            of_baseline = new.setdefault(row["baseline"] or row["variant"], {})
            of_baseline.setdefault(int(row["look"]), set()).add(int(row["seed"]))
    looks = {}
    for row in rows:
        of_baseline = new.get(row["baseline"] or row["variant"], {})
        if row.get("look") is not None:
            looks[row["variant"]] = [
                sorted(set().union(*(of_baseline[n] for n in of_baseline if n <= last)))
                for last in sorted(of_baseline)
            ]
    return looks


def steps_in(text: str | None) -> list[int]:
    """The steps in a text that `spans` wrote."""
    ends = [[int(end) for end in span.split("-")] for span in (text or "").split()]
    return [step for span in ends for step in range(span[0], span[-1] + 1)]


def _run(row: Row) -> RowRun:
    stability = row["stability"]
    options = [] if stability == "none" else stability.split("-")
    config: dict[str, Any] = {
        "choices": {axis: row[axis] for axis in AXES},
        "stability": {option: {} for option in options},
        "recipe": {
            "max_steps": int(row["max_steps"]),
            "learning_rate": float(row["learning_rate"]),
        },
        "model": {},
        "guard": {"on_nonfinite": row["on_nonfinite"]},
    }
    metric = row["loss_metric"]
    final = {
        metric: "loss",
        frac_metric(metric): "nonfinite_frac",
        tokens_metric(metric): "nonfinite_tokens",
        "train/loss": "train_loss",
    }
    record: dict[str, Any] = {
        "status": row["status"],
        "outcome": row["outcome"],
        "steps": int(row["steps"]),
        "own_steps": int(row["own_steps"]),
        "acts_from": int(row["acts_from"]),
        "vocab_size": row["vocab_size"],
        "guard": {"nonfinite_steps": steps_in(row["nonfinite_steps"])},
        "spikes": {"steps": steps_in(row["spike_steps"])},
        "final": {key: row[column] for key, column in final.items() if row.get(column) is not None},
        "tokens": row["tokens"],
        "active_flops": row["active_flops"],
        "wall_seconds": row["seconds"],
        "incident": _incident(row),
    }
    return RowRun(
        folder=Path(f"seed-{row['seed']}"),
        variant=row["variant"],
        seed=int(row["seed"]),
        repeat=int(row["repeat"]),
        config=config,
        record=record,
        baseline=row["baseline"],
        row=row,
    )


def _incident(row: Row) -> Mapping[str, Any] | None:
    if row["incident_step"] is None:
        return None
    parts = ("step", "module", "cause")
    return {part: row[f"incident_{part}"] for part in parts}
