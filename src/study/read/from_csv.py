"""A study again, out of the lines that its report has written, without its run folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from src.study.analysis.rows import Row, frac_metric
from src.study.read.collect import Run, Study

AXES = ("attention", "ffn", "model", "preset")


@dataclass(frozen=True, kw_only=True)
class RowRun(Run):
    """A run of which one line is known: all that statistics need, and its validations."""

    row: Row

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        """The validations alone."""
        metric = str(self.row["loss_metric"])
        found = []
        for text in str(self.row["validations"]).split():
            step, loss, frac = text.split(":")
            line = {"step": float(step), frac_metric(metric): float(frac)}
            found.append(line | ({metric: float(loss)} if loss else {}))
        return found


def rebuilt(name: str, rows: Sequence[Row]) -> Study:
    """The study whose `run_rows` these are, as text; statistics of it are those of the original.

    Args:
        name: of the study.
        rows: as read_csv gives them.
    """
    return Study(name=name, folder=Path(name), runs=[_run(row) for row in rows], sweeps=[])


def steps_in(text: str) -> list[int]:
    """What `spans` has written."""
    ends = [[int(end) for end in span.split("-")] for span in text.split()]
    return [step for span in ends for step in range(span[0], span[-1] + 1)]


def _run(row: Row) -> RowRun:
    stability = str(row["stability"])
    options = [] if stability == "none" else stability.split("-")
    config: dict[str, Any] = {
        "choices": {axis: row[axis] for axis in AXES},
        "stability": {option: {} for option in options},
        "recipe": {
            "max_steps": int(str(row["max_steps"])),
            "learning_rate": float(str(row["learning_rate"])),
        },
        "model": {},
        "guard": {"on_nonfinite": row["on_nonfinite"]},
    }
    metric = str(row["loss_metric"])
    final = {metric: "loss", frac_metric(metric): "nonfinite_frac", "train/loss": "train_loss"}
    record: dict[str, Any] = {
        "status": row["status"],
        "outcome": row["outcome"],
        "steps": int(str(row["steps"])),
        "own_steps": int(str(row["own_steps"])),
        "acts_from": int(str(row["acts_from"])),
        "vocab_size": _number(row, "vocab_size", int),
        "guard": {"nonfinite_steps": steps_in(str(row["nonfinite_steps"]))},
        "spikes": {"steps": steps_in(str(row["spike_steps"]))},
        "final": {key: _number(row, column) for key, column in final.items() if row[column]},
        "tokens": _number(row, "tokens", int),
        "active_flops": _number(row, "active_flops"),
        "wall_seconds": _number(row, "seconds"),
        "incident": _incident(row),
    }
    return RowRun(
        folder=Path(f"seed-{row['seed']}"),
        variant=str(row["variant"]),
        seed=int(str(row["seed"])),
        repeat=int(str(row["repeat"])),
        config=config,
        record=record,
        baseline=str(row["baseline"]) or None,
        row=row,
    )


def _number(row: Row, column: str, kind: type = float) -> Any:
    return kind(str(row[column])) if row[column] else None


def _incident(row: Row) -> Mapping[str, Any] | None:
    if not row["incident_step"]:
        return None
    parts = ("step", "module", "cause")
    return {part: row[f"incident_{part}"] for part in parts}
