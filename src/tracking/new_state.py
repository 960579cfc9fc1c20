"""Writes the state file of a run or a sweep: what MLflow will show, before anything is sent."""

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
    is_sweep,
    locked,
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
    """Writes the state of a run that starts or is resumed, without contacting the server.

    A resumed run stays the same MLflow run.

    Args:
        folder: the run folder, which holds config.yaml.
        uri: the server or database.
        facts: git_sha, git_dirty, versions and device, as far as they are known.
        parent_run_id: the id of the sweep's MLflow run; None: none.
        running: whether the run is in progress; False for a run of the past.
    """
    config = RunFolder(folder).read_config()
    assert config is not None
    with locked(folder):
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
            state.continue_from(known)
            # A resumed run has cut metrics.jsonl to its checkpoint. The lines that it writes again
            # are sent again; MLflow stores them as the same rows.
            state.lines_sent = min(known.lines_sent, len(metric_lines(folder)))
        state.write(file)
        return state


def begin_sweep(
    folder: Path, uri: str, experiment: str, *, command: str, description: str
) -> State:
    """Writes the state of a sweep, whose folder is runs/<study>/.sweeps/<sweep_id>."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
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
            state.continue_from(known)
        state.write(file)
        return state


def ensure_state(folder: Path, uri: str) -> State | None:
    """The state of a folder for one server; if there is none, it is made from the files on disk.

    Returns:
        The state; None for a sweep that has left no file to make one from.
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
    """The state of a past sweep: from its state for another server, or from its manifest."""
    for other in map(read_state, state_files(folder)):
        if other is not None:
            fresh: dict[str, Any] = {"run_id": None, "described": False, "closed": False}
            state = dataclasses.replace(other, uri=uri, **fresh)
            state.write(state_file(folder, uri))
            return state
    file = folder.with_name(f"{folder.name}.json")
    with damaged(file):
        manifest = read_json(file)
        if manifest is None:
            return None
        command = masked(manifest["command"])
        state = begin_sweep(folder, uri, manifest["study"], command=command, description="")
        state.begun = milliseconds(manifest["started"])
        state.ended = milliseconds(manifest["ended"])
        state.status = MLFLOW_STATUS.get(manifest["status"], KILLED)
        state.write(state_file(folder, uri))
    return state


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of record.json; None if there is no file. Raises InputError if it is damaged."""
    with damaged(folder / "record.json"):
        record = read_json(folder / "record.json")
        if record is not None and "status" not in record:
            raise ValueError("incomplete")
        return record


def metric_lines(folder: Path) -> list[str]:
    """The complete lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    with damaged(file):
        # Text after the last line break is a line that a kill has cut.
        return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []


def _time_of_start(folder: Path) -> int:
    """When a run of the past began, in milliseconds, as well as its folder tells."""
    record = read_record(folder)
    if record is None:
        return modified(folder / "config.yaml")
    return modified(folder / "record.json") - round(1000 * record["wall_seconds"])


def modified(file: Path) -> int:
    """When a file was last written, in milliseconds; now if it does not exist."""
    return milliseconds(file.stat().st_mtime if file.is_file() else None)
