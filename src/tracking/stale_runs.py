"""What earlier processes have left undone in MLflow: runs still open, deliveries still due."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src.tracking.client import Server
from src.tracking.labels import host
from src.tracking.push import end_of, end_tags, is_behind, push
from src.tracking.push_state import (
    KILLED,
    RUNNING,
    SWEEPS,
    is_held,
    read_state,
    state_files,
    writer_lock,
)

logger = logging.getLogger(__name__)


def mend(server: Server, experiment: str) -> list[str]:
    """Closes runs of a study that MLflow calls RUNNING although their process is gone.

    A process is gone when nobody holds the lock of its folder. Runs of other machines, whose locks
    cannot be seen from here, and runs that are not ours are left alone. One search, where there
    is nothing to mend.

    Returns:
        The names of the runs mended.
    """
    mended = []
    for run in server.search(experiment, f"attributes.status = '{RUNNING}'"):
        tags = run.data.tags
        if tags.get("host") != host() or "run_folder" not in tags:
            continue
        folder = Path(tags["run_folder"])
        if is_held(writer_lock(folder)):
            continue
        status, left = _left_as(folder, run)
        server.log(run.info.run_id, tags={**left, "mended": "true"})
        server.client.set_terminated(run.info.run_id, status=status)
        mended.append(str(run.info.run_name))
    return mended


def _left_as(folder: Path, run: Any) -> tuple[str, dict[str, str]]:
    """KILLED, unless the folder still belongs to this run and tells of another end."""
    for state in map(read_state, state_files(folder)):
        if state is not None and state.run_id == run.info.run_id:
            return end_of(folder, state), end_tags(folder, state)
    return KILLED, {"status": "killed", "outcome": "killed"}


def tracked_folders(study: Path) -> list[Path]:
    """Those of a study's sweeps, then those of its runs, moved aside or not."""
    sweeps = [path for path in sorted((study / SWEEPS).glob("*")) if path.is_dir()]
    return [*sweeps, *(file.parent for file in sorted(study.glob("*/seed-*/config.yaml")))]


def catch_up(runs: Path, server: Server, *, go_on: Callable[[], bool]) -> None:
    """Brings what a server has missed of earlier sweeps and runs, whatever their study.

    Args:
        runs: the folder of all studies.
        server: only what was meant for this one.
        go_on: asked before each.
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
