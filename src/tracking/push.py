"""Brings a run folder into MLflow: whatever of it is not there yet, and nothing twice."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.errors import damaged
from src.common.record import results
from src.common.run_folder import RunFolder, read_json
from src.common.tracking_address import masked
from src.tracking.client import MAX_METRICS, Server
from src.tracking.labels import PARENT, is_measured_by, run_params, run_tags, sweep_tags
from src.tracking.push_state import (
    KILLED,
    MLFLOW_STATUS,
    RUNNING,
    State,
    delivering,
    is_sweep,
    milliseconds,
    our_status,
    parent_id,
    read_state,
    state_file,
)
from src.tracking.settle import settle

ARTIFACTS = ("config.yaml", "record.json", "samples.md")
RESULT = "result"
"""Group of the metrics that sum a run up."""
REPORT = "report"
"""Folder of a sweep's artifacts."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What a delivery has brought."""

    described: bool = False
    """Whether the run was made or named anew."""
    num_lines: int = 0
    """Of metrics.jsonl."""
    status: str | None = None
    """MLflow's, where the run was closed."""

    def __bool__(self) -> bool:
        """Whether anything had been missing."""
        return self.described or self.num_lines > 0 or self.status is not None

    def __str__(self) -> str:
        """For people."""
        said = ["tags and params"] if self.described else []
        said += [f"{self.num_lines} lines of metrics"] if self.num_lines else []
        said += [f"its end ({self.status})"] if self.status else []
        return ", ".join(said)


def begin(
    folder: Path,
    uri: str,
    *,
    facts: Mapping[str, Any],
    parent_run_id: str | None,
    running: bool = True,
) -> State:
    """Writes down all that deliveries of a run will need; asks no server.

    A run that is known already stays the same one, with what has arrived of it.

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
            begun=milliseconds() if running else _begun(folder),
        )
        if parent_run_id is not None:
            state.tags[PARENT] = parent_run_id
        known = read_state(file)
        if known is not None:
            state.goes_on_from(known)
            # A resumed run has cut its metrics; the same steps come again, as the same rows.
            state.lines_sent = min(known.lines_sent, len(_lines(folder)))
        state.write(file)
        return state


def begin_sweep(folder: Path, uri: str, experiment: str, *, command: str, description: str) -> None:
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


def deliver(folder: Path, server: Server, *, over: bool) -> Delivered:
    """Sends what is missing of the run of a cell or of a sweep that has a state for this server.

    Args:
        folder: the run folder, or the sweep's.
        server: where to.
        over: whether its process is gone or at its end. Then the run is closed: as what it says
            itself, and as KILLED where it could not say anything any more.

    Returns:
        What was sent; nothing for a run that somebody deleted in MLflow.
    """
    with delivering(folder):
        file = state_file(folder, server.uri)
        state = read_state(file)
        assert state is not None
        _find_parent(folder, state)
        described = settle(server, state, file, running=not over)
        if described is None:
            return Delivered()
        num_lines = _send_lines(server, state, file, folder=folder)
        if not over:
            return Delivered(described=described, num_lines=num_lines)
        status = end_of(folder, state)
        news = not (_has_its_end(folder, state) and state.status == status)
        if news:
            close = _close_sweep if is_sweep(folder) else _close_run
            close(server, state, folder=folder, status=status)
            state.status, state.closed, state.summed_up = status, True, True
        # Without news as well: its time says what has been looked at.
        state.write(file)
        return Delivered(described=described, num_lines=num_lines, status=status if news else None)


def is_behind(folder: Path, file: Path) -> bool:
    """Whether a run that is over may miss something in the place of this state.

    Asked for every run that lies on the disk, so it looks at no more than it must.
    """
    state = read_state(file)
    if state is None or not (state.described and _has_its_end(folder, state)):
        return True
    sources = (folder / "record.json", folder / "metrics.jsonl")
    newest = max((path.stat().st_mtime for path in sources if path.is_file()), default=0.0)
    return newest > file.stat().st_mtime or _find_parent(folder, state)


def _has_its_end(folder: Path, state: State) -> bool:
    """Whether all is there that the end of a run brings; a sweep's own run is not summed up."""
    return state.closed and (state.summed_up or is_sweep(folder))


def end_of(folder: Path, state: State) -> str:
    """MLflow's status of a run whose process is gone."""
    record = _record(folder)
    if record is not None:
        return MLFLOW_STATUS[record["status"]]
    # A sweep says how it ended in its state; a child that died may have been given an end there.
    return KILLED if state.status == RUNNING else state.status


def end_tags(folder: Path, state: State) -> dict[str, str]:
    """The tags of a run or of a sweep that has ended."""
    named = our_status(end_of(folder, state))
    record = _record(folder)
    tags = {"status": named} if is_sweep(folder) else {"status": named, "outcome": named}
    if record is not None:
        incident = record["incident"]
        tags["outcome"] = record["outcome"] or named
        tags["incident"] = "none" if incident is None else incident["cause"]
        alarms = record.get("alarms", [])
        tags["alarm"] = alarms[0]["line"] if alarms else "none"
    elif state.status == RUNNING:
        tags["mended"] = "true"
    return tags


def _find_parent(folder: Path, state: State) -> bool:
    """Takes up the sweep's run if it is another than the state says; says whether it was."""
    parent = parent_id(folder, state.tags, state.uri)
    if parent is None or parent == state.tags.get(PARENT):
        return False
    state.tags[PARENT] = parent
    state.described = False
    return True


def _send_lines(server: Server, state: State, file: Path, *, folder: Path) -> int:
    """Sends the lines that are not there, and notes it after every batch.

    Without what an observer has measured. That is in the lines, for the runs that begin from this
    one, but on this run's page it would look like its own.
    """
    assert state.run_id is not None
    lines, before = _lines(folder), state.lines_sent
    if before >= len(lines):
        return 0
    config = RunFolder(folder).read_config() or {}
    observers = config.get("observe", {})
    points: list[tuple[str, float, int, int]] = []
    for number, text in enumerate(lines[before:], start=before + 1):
        with damaged(file.with_name("metrics.jsonl")):
            line = json.loads(text)
            step = int(line.pop("step"))
        points += [
            (name, value, state.begun + step, step)
            for name, value in line.items()
            if not is_measured_by(name, observers)
        ]
        if len(points) >= MAX_METRICS or number == len(lines):
            server.log(state.run_id, metrics=points)
            state.lines_sent, points = number, []
            state.write(file)
    return max(0, state.lines_sent - before)


def _close_run(server: Server, state: State, *, folder: Path, status: str) -> None:
    assert state.run_id is not None
    record = _record(folder)
    if record is None:
        ended = _modified(folder / "metrics.jsonl")
    else:
        ended = _modified(folder / "record.json")
        points = [
            (f"{RESULT}/{name}", float(value), ended, int(record["steps"]))
            for name, value in results(record).items()
        ]
        server.log(state.run_id, metrics=points)
    server.log(state.run_id, tags=end_tags(folder, state))
    # Before the files, whose place may be out of reach while the server is not.
    server.client.set_terminated(state.run_id, status=status, end_time=ended)
    for name in ARTIFACTS:
        if (folder / name).is_file():
            # Earlier versions wrote what is secret in an address into config.yaml.
            text = masked((folder / name).read_text(encoding="utf-8"))
            server.client.log_text(state.run_id, text, name)


def _close_sweep(server: Server, state: State, *, folder: Path, status: str) -> None:
    assert state.run_id is not None
    ended = milliseconds() if state.ended is None else state.ended
    # By time, because a sweep that is run again has other figures for the same step.
    metrics = [(name, value, ended, 0) for name, value in state.metrics.items()]
    server.log(state.run_id, metrics=metrics, tags=end_tags(folder, state) | state.tags)
    server.client.set_terminated(state.run_id, status=status, end_time=ended)
    for path in map(Path, state.artifacts):
        if path.is_dir():
            server.client.log_artifacts(state.run_id, str(path), f"{REPORT}/{path.name}")
        elif path.is_file():
            server.client.log_artifact(state.run_id, str(path), REPORT)


def _record(folder: Path) -> dict[str, Any] | None:
    with damaged(folder / "record.json"):
        record = read_json(folder / "record.json")
        if record is not None and "status" not in record:
            raise ValueError("incomplete")
        return record


def _lines(folder: Path) -> list[str]:
    """The complete lines of metrics.jsonl; what follows the last line break a kill has cut."""
    file = folder / "metrics.jsonl"
    with damaged(file):
        return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []


def _begun(folder: Path) -> int:
    """When a run of the past began, as nearly as its folder tells."""
    record = _record(folder)
    if record is None:
        return _modified(folder / "config.yaml")
    return _modified(folder / "record.json") - round(1000 * record["wall_seconds"])


def _modified(file: Path) -> int:
    return milliseconds(file.stat().st_mtime if file.is_file() else None)
