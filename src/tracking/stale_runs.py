"""Completes what other processes left undone in MLflow: runs of killed jobs, and unsent parts."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src.tracking.client import Server, bounded
from src.tracking.labels import host
from src.tracking.push import end_of, end_tags, is_behind, push
from src.tracking.push_state import (
    KILLED,
    RUNNING,
    SWEEPS,
    changing,
    is_held,
    read_state,
    state_files,
    writer_lock,
)

logger = logging.getLogger(__name__)

RUN_SECONDS = 20.0
"""How long sending one run may take."""


def close_run(folder: Path, status: str) -> None:
    """Closes the MLflow run of a run folder whose process died without doing so.

    Does nothing if there is no MLflow run, if it is closed already, or if another process writes to
    the folder. If the server is unreachable, src.sync closes the run later.

    Args:
        folder: the run folder.
        status: KILLED or FAILED. If the process still wrote a record, the record's status counts.
    """
    assert status in ("KILLED", "FAILED")

    def act() -> None:
        if is_held(writer_lock(folder)):
            return
        for file in state_files(folder):
            known = read_state(file)
            assert known is not None
            if known.status == RUNNING:
                with changing(folder, known.uri) as state:
                    state.status = status
            if is_behind(folder, file):
                push(folder, Server(known.uri), over=True)

    try:
        bounded(act, RUN_SECONDS)
    except Exception:  # Nothing is lost: the state in the folder says what remains to be sent.
        logger.info("mlflow: %s", folder, exc_info=True)


def close_stale_runs(server: Server, experiment: str) -> list[str]:
    """Closes runs of a study that MLflow shows as RUNNING although their process has ended.

    A process has ended if no process holds the lock of its folder. Runs of other machines, whose
    locks are not visible here, and runs of other programs are left alone. If there is nothing to
    close, this costs one request.

    Returns:
        The names of the closed runs.
    """
    closed = []
    for run in server.search(experiment, f"attributes.status = '{RUNNING}'"):
        tags = run.data.tags
        if tags.get("host") != host() or "run_folder" not in tags:
            continue
        folder = Path(tags["run_folder"])
        if is_held(writer_lock(folder)):
            continue
        status, tags_of_end = _end_of_stale_run(folder, run)
        server.log(run.info.run_id, tags={**tags_of_end, "mended": "true"})
        server.client.set_terminated(run.info.run_id, status=status)
        closed.append(str(run.info.run_name))
    return closed


def _end_of_stale_run(folder: Path, run: Any) -> tuple[str, dict[str, str]]:
    """The status and the tags of the end: KILLED, unless the run's folder tells another end.

    The folder may hold a newer run by now.
    """
    for state in map(read_state, state_files(folder)):
        if state is not None and state.run_id == run.info.run_id:
            return end_of(folder, state), end_tags(folder, state)
    return KILLED, {"status": "killed", "outcome": "killed"}


def tracked_folders(study: Path) -> list[Path]:
    """The folders of a study's sweeps, then of its runs, including those moved aside."""
    sweeps = [path for path in sorted((study / SWEEPS).glob("*")) if path.is_dir()]
    return [*sweeps, *(file.parent for file in sorted(study.glob("*/seed-*/config.yaml")))]


def catch_up(runs: Path, server: Server, *, go_on: Callable[[], bool]) -> None:
    """Sends what a server has missed of earlier sweeps and runs of all studies.

    Args:
        runs: the folder of all studies.
        server: only runs that were meant for this server are sent.
        go_on: called before each; False ends the work.
    """
    for folder in _behind(runs, server.uri):
        if not go_on():
            return
        if not is_held(writer_lock(folder)):
            logger.info("mlflow: %s: %s", folder, push(folder, server, over=True))


def _behind(runs: Path, uri: str) -> Iterator[Path]:
    for study in sorted(runs.glob("*")):
        for folder in tracked_folders(study):
            for file in state_files(folder):
                state = read_state(file)
                if state is None or state.uri != uri or state.tags["host"] != host():
                    continue
                if is_behind(folder, file):
                    yield folder
