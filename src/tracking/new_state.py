"""What MLflow will show of a run or sweep, written down before anything is sent."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.errors import damaged
from src.common.run_folder import RunFolder, read_json
from src.common.tracking_address import masked
from src.tracking.labels import PARENT, run_params, run_tags, sweep_tags
from src.tracking.push_state import (
    KILLED,
    MLFLOW_STATUS,
    State,
    delivering,
    is_sweep,
    milliseconds,
    read_state,
    state_file,
    state_files,
)


def begin(
    folder: Path,
    uri: str,
    *,
    facts: Mapping[str, Any],
    parent_run_id: str | None,
    running: bool = True,
) -> State:
    """Writes the state of a run that starts or is resumed; asks no server.

    A run that MLflow knows already stays the same MLflow run.

    Args:
        folder: the run folder; its config.yaml is there.
        uri: of the server.
        facts: git_sha, git_dirty, versions, device, as far as they are known.
        parent_run_id: of the sweep's run there.
        running: whether the run is in progress, and not one of the past.
    """
    config = RunFolder(folder).read_config()
    assert config is not None
    with delivering(folder):
        file = state_file(folder, uri)
        state = State(
            uri=uri,
            experiment=config["study"],
            run_name=f"{folder.parent.name}/{folder.name}",
            tags=run_tags(config, folder, facts=facts),
            params=run_params(config),
            begun=milliseconds() if running else _time_of_start(folder),
        )
        if parent_run_id is not None:
            state.tags[PARENT] = parent_run_id
        known = read_state(file)
        if known is not None:
            state.goes_on_from(known)
            # A resumed run has cut its metrics; the same steps come again, as the same rows.
            state.lines_sent = min(known.lines_sent, len(metric_lines(folder)))
        state.write(file)
        return state


def begin_sweep(
    folder: Path, uri: str, experiment: str, *, command: str, description: str
) -> State:
    """The same for a sweep, whose folder is runs/<study>/.sweeps/<sweep_id>."""
    folder.mkdir(parents=True, exist_ok=True)
    with delivering(folder):
        file = state_file(folder, uri)
        state = State(
            uri=uri,
            experiment=experiment,
            run_name=f"sweep {folder.name}",
            tags=sweep_tags(folder, command=command, description=description),
            params={},
            begun=milliseconds(),
        )
        known = read_state(file)
        if known is not None:
            state.goes_on_from(known)
        state.write(file)
        return state


def ensure_state(folder: Path, uri: str) -> State | None:
    """The state of a folder for one server; made from what lies on disk if there is none.

    Returns:
        None for a sweep that has left nothing from which its MLflow run could be made.
    """
    known = read_state(state_file(folder, uri))
    if known is not None:
        return known
    if is_sweep(folder):
        return _past_sweep(folder, uri)
    with damaged(folder / "record.json"):
        facts = read_json(folder / "record.json") or {}
    return begin(folder, uri, facts=facts, parent_run_id=None, running=False)


def _past_sweep(folder: Path, uri: str) -> State | None:
    """From its state for another server, else from the file that it left beside its runs."""
    for other in map(read_state, state_files(folder)):
        if other is not None:
            fresh: dict[str, Any] = {"run_id": None, "described": False, "closed": False}
            state = dataclasses.replace(other, uri=uri, **fresh)
            state.write(state_file(folder, uri))
            return state
    file = folder.with_name(f"{folder.name}.json")
    with damaged(file):
        left = read_json(file)
        if left is None:
            return None
        command = masked(left["command"])
        state = begin_sweep(folder, uri, left["study"], command=command, description="")
        state.begun = milliseconds(left["started"])
        state.ended = milliseconds(left["ended"])
        state.status = MLFLOW_STATUS.get(left["status"], KILLED)
        state.write(state_file(folder, uri))
    return state


def read_record(folder: Path) -> dict[str, Any] | None:
    """record.json, or None if there is none. Raises InputError if it is damaged."""
    with damaged(folder / "record.json"):
        record = read_json(folder / "record.json")
        if record is not None and "status" not in record:
            raise ValueError("incomplete")
        return record


def metric_lines(folder: Path) -> list[str]:
    """The complete lines of metrics.jsonl; what follows the last line break a kill has cut."""
    file = folder / "metrics.jsonl"
    with damaged(file):
        return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []


def _time_of_start(folder: Path) -> int:
    """When a run of the past began, as nearly as its folder tells."""
    record = read_record(folder)
    if record is None:
        return modified(folder / "config.yaml")
    return modified(folder / "record.json") - round(1000 * record["wall_seconds"])


def modified(file: Path) -> int:
    """When a file was written, in milliseconds; now if there is none."""
    return milliseconds(file.stat().st_mtime if file.is_file() else None)
