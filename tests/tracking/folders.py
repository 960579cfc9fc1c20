"""Run folders as runs leave them, made without training, and what MLflow holds of them."""

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from src.common.run_folder import RunFolder, read_metrics
from src.config.compose import compose
from tests.conftest import TINY

LINES = [
    {"step": step, "train/loss": 4.0 - step / 10, "lr": 0.1, "speed/step_seconds": 0.01 * step}
    for step in (1, 4, 8, 12)
]


def make_run(
    *more: str,
    lines: list[dict[str, float]] = LINES,
    status: str | None = "finished",
    loss: float = 3.0,
) -> Path:
    """A run folder below runs/; `status` None is a run that left no record."""
    config = compose("train", [*TINY, *more])
    folder = RunFolder(config.folder)
    folder.open()
    folder.close()
    folder.write_config(config.plain(), config_hash="0123456789abcdef")
    write_lines(folder.path, lines)
    if status is not None:
        write_record(folder.path, status=status, loss=loss)
    return folder.path


def write_lines(folder: Path, lines: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def write_record(folder: Path, *, status: str, loss: float = 3.0, warned: bool = False) -> None:
    record = {
        "status": status,
        "outcome": "clean" if status == "finished" else None,
        "steps": 12,
        "wall_seconds": 60.0,
        "final": {"val/loss": loss},
        "best": {"val/loss": loss, "step": 12},
        "guard": {},
        "incident": None,
        "alarms": [{"step": 9, "line": "step 9: it falls"}] if warned else [],
        "git_sha": "f00d",
        "versions": {"torch": "2.13.0"},
        "device": {"type": "cpu"},
    }
    RunFolder(folder).write_record(record)


def query(database: Path, sql: str) -> list[Any]:
    with sqlite3.connect(database) as connection:
        return connection.execute(sql).fetchall()


def runs(database: Path) -> dict[str, str]:
    """Status by name, of runs that nobody deleted."""
    found = query(database, "select name, status from runs where lifecycle_stage = 'active'")
    assert len(dict(found)) == len(found)
    return dict(found)


def tags(database: Path, name: str) -> dict[str, str]:
    return dict(
        query(
            database,
            "select key, value from tags join runs using (run_uuid)"
            f" where name = '{name}' and lifecycle_stage = 'active'",
        )
    )


def run_ids(database: Path) -> dict[str, str]:
    return dict(query(database, "select name, run_uuid from runs"))


def points(database: Path, name: str) -> Counter[tuple[str, int, float]]:
    """How often each (metric, step, value) of a run is stored; without what its end adds."""
    return Counter(
        query(
            database,
            "select key, step, value from metrics join runs using (run_uuid)"
            f" where name = '{name}' and key not like 'result/%'"
            " and lifecycle_stage = 'active'",
        )
    )


def points_on_disk(folder: Path) -> Counter[tuple[str, int, float]]:
    return Counter(
        (key, line["step"], value)
        for line in read_metrics(folder / "metrics.jsonl")
        for key, value in line.items()
        if key != "step"
    )


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"
