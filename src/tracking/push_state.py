"""mlflow.json: what MLflow should show of a run, and how much of it was sent already.

With this file, what to send depends on the folder alone, whichever process sends it and when.
"""

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from src.common.errors import damaged
from src.common.run_folder import read_json, write_json
from src.common.tracking_address import without_secrets

RUNNING, KILLED = "RUNNING", "KILLED"
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
"""MLflow's status, by the status of a record."""

SWEEPS = ".sweeps"
"""The folder of a study's sweeps, beside those of its variants: runs/<study>/.sweeps/<sweep_id>."""

WAIT_SECONDS = 30.0
"""How long to wait while another process sends the same folder."""


@dataclass(kw_only=True)
class State:
    """The state of one run on one server or database."""

    uri: str
    experiment: str
    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """Value of a tag by which the run is found if a crash prevented its id from being written."""
    begun: int
    """Time of step 0 in milliseconds. A metric of step n gets the time begun + n, so that sending
    it again, after a crash or from a resumed run, gives the same row."""
    run_id: str | None = None
    described: bool = False
    """Whether tags and params were sent."""
    lines_sent: int = 0
    """Number of lines of metrics.jsonl that were sent."""
    status: str = RUNNING
    """MLflow's status. A status in the run's record takes precedence."""
    closed: bool = False
    """Whether everything about the end of the run was sent."""
    summed_up: bool = False
    """Whether the metrics result/* were sent; states of early versions lack this field."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The metrics of a sweep."""
    artifacts: list[str] = dataclasses.field(default_factory=list)
    """The files of a sweep."""
    ended: int | None = None
    """When a sweep ended, in milliseconds."""

    def continue_from(self, earlier: "State") -> None:
        """Makes this the state of the same MLflow run as `earlier`."""
        self.key, self.begun, self.run_id = earlier.key, earlier.begun, earlier.run_id

    def write(self, file: Path) -> None:
        write_json(file, dataclasses.asdict(self))


def read_state(file: Path) -> State | None:
    """The state in a file; None if the file does not exist.

    Raises:
        InputError: the file is damaged.
    """
    with damaged(file):
        content = read_json(file)
        try:
            if content is None:
                return None
            # Early versions wrote the password of an address into this file.
            return State(**{**content, "uri": without_secrets(content["uri"])})
        except TypeError as error:
            raise ValueError(str(error)) from error


def state_files(folder: Path) -> list[Path]:
    """The state files of a folder, one for each server; that of the first server comes first."""
    return sorted(folder.glob("mlflow*.json"), key=lambda file: len(file.name))


def state_file(folder: Path, uri: str) -> Path:
    """The state file for one server, existing or not; the first server's is mlflow.json."""
    files = state_files(folder)
    for file in files:
        known = read_state(file)
        if known is not None and known.uri == uri:
            return file
    if not files:
        return folder / "mlflow.json"
    return folder / f"mlflow-{hashlib.sha256(uri.encode()).hexdigest()[:8]}.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock for reading and writing the states of a folder; raises filelock.Timeout."""
    with filelock.FileLock(folder / ".mlflow.lock", timeout=WAIT_SECONDS):
        yield


@contextmanager
def changing(folder: Path, uri: str) -> Iterator[State]:
    """The state of a folder for one server; changes made in this context are written at its end."""
    with locked(folder):
        file = state_file(folder, uri)
        state = read_state(file)
        assert state is not None
        yield state
        state.write(file)


def record_status(status: str) -> str:
    """The status of a record, by MLflow's status."""
    return next(ours for ours, theirs in MLFLOW_STATUS.items() if theirs == status)


def is_sweep(folder: Path) -> bool:
    """Whether a folder belongs to a sweep rather than a run."""
    return folder.parent.name == SWEEPS


def writer_lock(folder: Path) -> Path:
    """The lock that the process of a run or a sweep holds as long as it lives."""
    return folder.with_name(f"{folder.name}.lock") if is_sweep(folder) else folder / ".lock"


def is_held(lock: Path) -> bool:
    """Whether any process holds a lock."""
    if not lock.is_file():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def milliseconds(seconds: float | None = None) -> int:
    """Seconds as MLflow's milliseconds; None: now."""
    return round(1000 * (time.time() if seconds is None else seconds))


def parent_id(folder: Path, tags: Mapping[str, Any], uri: str) -> str | None:
    """The id of the MLflow run of the sweep that a run belongs to; None if none is known."""
    if "sweep_id" not in tags or is_sweep(folder):
        return None
    sweep = folder.parent.parent / SWEEPS / str(tags["sweep_id"])
    known = read_state(state_file(sweep, uri))
    return None if known is None or known.uri != uri else known.run_id
