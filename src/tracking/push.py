"""Sends a run folder to MLflow: everything that is not there yet, without repeats."""

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
from src.tracking.compare_view import REPORT, CompareView
from src.tracking.labels import PARENT, is_measured_by
from src.tracking.new_state import ensure_state, metric_lines, modified, read_record
from src.tracking.push_state import (
    KILLED,
    MLFLOW_STATUS,
    RUNNING,
    State,
    is_sweep,
    locked,
    milliseconds,
    parent_id,
    read_state,
    record_status,
    state_file,
)

ARTIFACTS = ("config.yaml", "record.json", "samples.md")
KEY = "mirror_key"
"""The tag by which a run is found again if its id was lost in a crash."""

RESULT = "result"
"""Group of the metrics that summarise a run."""
SUMMARY = "summary.md"
"""The file of a report that becomes the description of the sweep's run."""
NOTE = "mlflow.note.content"
"""The tag of a description, which MLflow's pages show as Markdown."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent. Falsy if nothing was."""

    described: bool = False
    """Whether tags and params were sent."""
    num_lines: int = 0
    """Number of lines of metrics.jsonl."""
    status: str | None = None
    """MLflow's status of the run, if the run was closed; otherwise None."""

    def __bool__(self) -> bool:
        return self.described or self.num_lines > 0 or self.status is not None

    def __str__(self) -> str:
        items = ["tags and params"] if self.described else []
        items += [f"{self.num_lines} lines of metrics"] if self.num_lines else []
        items += [f"its end ({self.status})"] if self.status else []
        return ", ".join(items)


def push(folder: Path, server: Server, *, over: bool) -> Pushed:
    """Sends everything of a run or a sweep that MLflow does not have yet, without repeats.

    Everything that sends runs to MLflow calls this: the thread that follows a run, the sweep, the
    closing of runs whose process died, and src.sync.

    Args:
        folder: the folder of the run or the sweep.
        server: where to send it.
        over: whether the process has ended or is about to. If so, the run is closed: with the
            status that it recorded, or as KILLED if it recorded none.

    Returns:
        What was sent; nothing if the run was deleted in MLflow.
    """
    state = ensure_state(folder, server.uri)
    if state is None:
        return Pushed()
    with locked(folder):
        file = state_file(folder, server.uri)
        state = read_state(file) or state
        _find_parent(folder, state)
        described = _find_or_create(server, state, file, running=not over)
        if described is None:
            return Pushed()
        num_lines = _send_lines(server, state, file, folder=folder)
        if not over:
            return Pushed(described=described, num_lines=num_lines)
        status = end_of(folder, state)
        must_close = not (_is_closed(folder, state) and state.status == status)
        if must_close:
            close = _close_sweep if is_sweep(folder) else _close_run
            close(server, state, folder=folder, status=status)
            state.status, state.closed, state.summed_up = status, True, True
        # Written even if nothing was sent: `is_behind` compares the time of this file.
        state.write(file)
        sent_status = status if must_close else None
        return Pushed(described=described, num_lines=num_lines, status=sent_status)


def is_behind(folder: Path, file: Path) -> bool:
    """Whether MLflow may lack something of a run that has ended.

    Called for every run on disk, so it reads as little as possible.

    Args:
        folder: the folder of the run or the sweep.
        file: its state file for one server.
    """
    state = read_state(file)
    if state is None or not (state.described and _is_closed(folder, state)):
        return True
    sources = (folder / "record.json", folder / "metrics.jsonl")
    newest = max((path.stat().st_mtime for path in sources if path.is_file()), default=0.0)
    return newest > file.stat().st_mtime or _find_parent(folder, state)


def _is_closed(folder: Path, state: State) -> bool:
    """Whether everything about the end of a run was sent; a sweep has no result metrics."""
    return state.closed and (state.summed_up or is_sweep(folder))


def end_of(folder: Path, state: State) -> str:
    """MLflow's status of a run or a sweep whose process has ended."""
    record = read_record(folder)
    if record is not None:
        return MLFLOW_STATUS[record["status"]]
    # Without a record, the state may hold the status: a sweep writes its own there, and
    # `stale_runs.close_run` writes that of a run whose process died.
    return KILLED if state.status == RUNNING else state.status


def end_tags(folder: Path, state: State) -> dict[str, str]:
    """The tags that tell how a run or a sweep has ended."""
    status = record_status(end_of(folder, state))
    record = read_record(folder)
    tags = {"status": status} if is_sweep(folder) else {"status": status, "outcome": status}
    if record is not None:
        incident = record["incident"]
        tags["outcome"] = record["outcome"] or status
        tags["incident"] = "none" if incident is None else incident["cause"]
        alarms = record.get("alarms", [])
        tags["alarm"] = alarms[0]["line"] if alarms else "none"
    elif state.status == RUNNING:
        tags["mended"] = "true"
    return tags


def _find_or_create(server: Server, state: State, file: Path, *, running: bool) -> bool | None:
    """Finds or creates the run in MLflow, and sends its tags and params if they are missing.

    Args:
        server: the server.
        state: the run's state, in which its id is filled in.
        file: the file of the state.
        running: whether the run is still in progress.

    Returns:
        Whether tags and params were sent; None if the run was deleted in MLflow.
    """
    run = None if state.run_id is None else server.run(state.run_id)
    if run is None:
        # The run may have been created just before a crash, so that its id was not written down.
        # Or the database was replaced, so that the run must be created and sent again.
        found = server.search(state.experiment, f"tags.{KEY} = '{state.key}'")
        run = found[0] if found else _create(server, state)
        state.run_id = str(run.info.run_id)
        state.described, state.closed, state.lines_sent = False, False, 0
        state.write(file)
    deleted = run.info.lifecycle_stage == "deleted"
    if state.described:
        return None if deleted else False
    if deleted:
        # A deleted run that is trained again must be restored.
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
        # These replace the tags of an earlier end, if the run was resumed.
        tags["status"] = "running"
        if state.tags["kind"] == "run":
            tags["outcome"] = "running"
        if "mended" in run.data.tags:
            server.client.delete_tag(state.run_id, "mended")
    # MLflow raises an error if a param is set again, so only missing ones are sent.
    missing = {k: v for k, v in state.params.items() if k not in run.data.params}
    server.log(state.run_id, params=missing, tags=tags)


def _find_parent(folder: Path, state: State) -> bool:
    """Puts the id of the sweep's MLflow run into the state; returns whether the state changed."""
    parent = parent_id(folder, state.tags, state.uri)
    if parent is None or parent == state.tags.get(PARENT):
        return False
    state.tags[PARENT] = parent
    state.described = False
    return True


def _send_lines(server: Server, state: State, file: Path, *, folder: Path) -> int:
    """Sends the missing lines of metrics.jsonl and updates the state after every batch.

    Metrics of observers are left out. They are in the file for the branches of this run; in
    MLflow they would look like the run's own metrics. Returns the number of lines.
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
    """The loss by which a run is judged; the record may be of an early version."""
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
    # Before the files, because their storage may be down although the server is up.
    server.client.set_terminated(state.run_id, status=status, end_time=ended)
    for name in ARTIFACTS:
        if (folder / name).is_file():
            # Early versions wrote the password of an address into config.yaml.
            text = masked((folder / name).read_text(encoding="utf-8"))
            server.client.log_text(state.run_id, text, name)


def _close_sweep(server: Server, state: State, *, folder: Path, status: str) -> None:
    assert state.run_id is not None
    ended = milliseconds() if state.ended is None else state.ended
    # All carry the time of the end, so that a repeated sweep adds later values.
    metrics = [(name, value, ended, 0) for name, value in state.metrics.items()]
    tags = end_tags(folder, state) | state.tags | _description(server, state)
    server.log(state.run_id, metrics=metrics, tags=tags)
    server.client.set_terminated(state.run_id, status=status, end_time=ended)
    for path in map(Path, state.artifacts):
        if path.is_dir():
            server.client.log_artifacts(state.run_id, str(path), f"{REPORT}/{path.name}")
        elif path.is_file():
            server.client.log_artifact(state.run_id, str(path), REPORT)


def _description(server: Server, state: State) -> dict[str, str]:
    """The tag with links to the report and to the arms, and then the report's answer and table."""
    for file in map(Path, state.artifacts):
        if file.name == SUMMARY and file.is_file():
            view = CompareView(
                experiment_id=server.experiment_id(state.experiment), sweep_run_id=state.run_id
            )
            found = view.links()
            links = [f"[{what}]({found[what]})" for what in ("report", "arms compared")]
            text = masked(file.read_text(encoding="utf-8"))
            return {NOTE: f"{' · '.join(links)}\n\n{text}"}
    return {}
