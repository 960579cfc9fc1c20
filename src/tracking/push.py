"""Brings a run folder into MLflow: whatever of it is not there yet, and nothing twice."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.errors import damaged
from src.common.record import results
from src.common.run_folder import RunFolder
from src.common.tracking_address import masked
from src.config.remedy_roles import loss_metric, roles_of
from src.tracking.client import MAX_METRICS, Server
from src.tracking.labels import PARENT, is_measured_by
from src.tracking.new_state import ensure_state, metric_lines, modified, read_record
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

ARTIFACTS = ("config.yaml", "record.json", "samples.md")
KEY = "mirror_key"
"""The tag by which a run is found again after a crash."""

RESULT = "result"
"""Group of the metrics that sum a run up."""
REPORT = "report"
"""Folder of a sweep's artifacts."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent."""

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


def push(folder: Path, server: Server, *, over: bool) -> Pushed:
    """Sends whatever of a run or a sweep MLflow does not have yet, and nothing twice.

    Everything that brings runs into MLflow calls this: the thread that follows a run, the sweep,
    the closing of runs whose process died, and src.sync.

    Args:
        folder: the run folder, or the sweep's.
        server: where to.
        over: whether its process is gone or at its end. Then the run is closed: as what it says
            itself, and as KILLED where it could not say anything any more.

    Returns:
        What was sent; nothing for a run that somebody deleted in MLflow.
    """
    state = ensure_state(folder, server.uri)
    if state is None:
        return Pushed()
    with delivering(folder):
        file = state_file(folder, server.uri)
        state = read_state(file) or state
        _find_parent(folder, state)
        described = _settle(server, state, file, running=not over)
        if described is None:
            return Pushed()
        num_lines = _send_lines(server, state, file, folder=folder)
        if not over:
            return Pushed(described=described, num_lines=num_lines)
        status = end_of(folder, state)
        news = not (_has_its_end(folder, state) and state.status == status)
        if news:
            close = _close_sweep if is_sweep(folder) else _close_run
            close(server, state, folder=folder, status=status)
            state.status, state.closed, state.summed_up = status, True, True
        # Without news as well: its time says what has been looked at.
        state.write(file)
        return Pushed(described=described, num_lines=num_lines, status=status if news else None)


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
    record = read_record(folder)
    if record is not None:
        return MLFLOW_STATUS[record["status"]]
    # A sweep says how it ended in its state; a child that died may have been given an end there.
    return KILLED if state.status == RUNNING else state.status


def end_tags(folder: Path, state: State) -> dict[str, str]:
    """The tags of a run or of a sweep that has ended."""
    named = our_status(end_of(folder, state))
    record = read_record(folder)
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


def _settle(server: Server, state: State, file: Path, *, running: bool) -> bool | None:
    """Makes or finds the run, and describes it unless that is done.

    Args:
        server: where.
        state: of the run; its id is filled in.
        file: of the state.
        running: whether the run goes on, and not only the news of it.

    Returns:
        Whether anything had to be done; None where somebody has deleted the run.
    """
    run = None if state.run_id is None else server.run(state.run_id)
    if run is None:
        # It may have been made just before a crash; or the database is another one by now.
        found = server.search(state.experiment, f"tags.{KEY} = '{state.key}'")
        run = found[0] if found else _create(server, state)
        state.run_id = str(run.info.run_id)
        state.described, state.closed, state.lines_sent = False, False, 0
        state.write(file)
    deleted = run.info.lifecycle_stage == "deleted"
    if state.described:
        return None if deleted else False
    if deleted:
        # It is trained again, so it is wanted.
        server.client.restore_run(state.run_id)
    _describe(server, state, run, running=running)
    state.described = True
    state.write(file)
    return True


def _create(server: Server, state: State) -> Any:
    return server.client.create_run(
        server.experiment_id(state.experiment),
        start_time=state.begun,
        tags={KEY: state.key, **state.tags},
        run_name=state.run_name,
    )


def _describe(server: Server, state: State, run: Any, *, running: bool) -> None:
    assert state.run_id is not None
    tags = dict(state.tags)
    if running:
        server.client.update_run(state.run_id, status=RUNNING)
        # Also because of what an earlier end has left.
        tags["status"] = "running"
        if state.tags["kind"] == "run":
            tags["outcome"] = "running"
        if "mended" in run.data.tags:
            server.client.delete_tag(state.run_id, "mended")
    # Params cannot be changed there; what was set once stays.
    missing = {k: v for k, v in state.params.items() if k not in run.data.params}
    server.log(state.run_id, params=missing, tags=tags)


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
    lines, before = metric_lines(folder), state.lines_sent
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


def _loss_metric(record: Mapping[str, Any]) -> str:
    """The loss by which a run is judged, of a record that may be an early version's."""
    names = str(record.get("variant", {}).get("stability", "none")).split("-")
    return loss_metric(roles_of(record, [name for name in names if name != "none"]))


def _close_run(server: Server, state: State, *, folder: Path, status: str) -> None:
    assert state.run_id is not None
    record = read_record(folder)
    if record is None:
        ended = modified(folder / "metrics.jsonl")
    else:
        ended = modified(folder / "record.json")
        points = [
            (f"{RESULT}/{name}", float(value), ended, int(record["steps"]))
            for name, value in results(record, loss=_loss_metric(record)).items()
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
