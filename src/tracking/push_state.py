"""mlflow.json: what MLflow shall show of a run, and how much of it has arrived there.

With it the delivery is a function of the folder alone, whoever does it and whenever.
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
"""MLflow's word for the status of a record."""

SWEEPS = ".sweeps"
"""Folder of a study, beside those of its variants: runs/<study>/.sweeps/<sweep_id>."""

WAIT_SECONDS = 30.0
"""For somebody else's delivery of the same folder."""


@dataclass(kw_only=True)
class State:
    """One run in one place of MLflow's."""

    uri: str
    experiment: str
    run_name: str
    tags: dict[str, str]
    params: dict[str, str]
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """Tag by which a run is found whose id a crash kept from being written here."""
    begun: int
    """Time of step 0 in milliseconds. A metric of step n gets the time begun + n: one that is sent
    again, after a crash or by a resumed run, is then the same row."""
    run_id: str | None = None
    described: bool = False
    """Whether tags and params are there."""
    lines_sent: int = 0
    """Lines of metrics.jsonl that are there."""
    status: str = RUNNING
    """MLflow's, once an end is known; what the record of a run says comes before it."""
    closed: bool = False
    """Whether everything that the end of the run brings is there."""
    summed_up: bool = False
    """Whether result/* is among it; states of earlier versions do not say so."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """A sweep's figures."""
    artifacts: list[str] = dataclasses.field(default_factory=list)
    """A sweep's files."""
    ended: int | None = None
    """When a sweep ended, in milliseconds."""

    def goes_on_from(self, earlier: "State") -> None:
        """Makes this another life of a run that is there already."""
        self.key, self.begun, self.run_id = earlier.key, earlier.begun, earlier.run_id

    def write(self, file: Path) -> None:
        """Writes it, whole or not at all."""
        write_json(file, dataclasses.asdict(self))


def read_state(file: Path) -> State | None:
    """The state that a file holds, or None where there is none.

    Raises:
        InputError: it is damaged.
    """
    with damaged(file):
        content = read_json(file)
        try:
            if content is None:
                return None
            # Earlier versions wrote down what is secret in an address.
            return State(**{**content, "uri": without_secrets(content["uri"])})
        except TypeError as error:
            raise ValueError(str(error)) from error


def state_files(folder: Path) -> list[Path]:
    """One for each place that this folder has been sent to, the first one first."""
    return sorted(folder.glob("mlflow*.json"), key=lambda file: len(file.name))


def state_file(folder: Path, uri: str) -> Path:
    """Where the state for one place is or belongs: mlflow.json for the first that was named."""
    files = state_files(folder)
    for file in files:
        known = read_state(file)
        if known is not None and known.uri == uri:
            return file
    if not files:
        return folder / "mlflow.json"
    return folder / f"mlflow-{hashlib.sha256(uri.encode()).hexdigest()[:8]}.json"


@contextmanager
def delivering(folder: Path) -> Iterator[None]:
    """Held by whoever reads and writes the states of a folder; raises filelock.Timeout."""
    with filelock.FileLock(folder / ".mlflow.lock", timeout=WAIT_SECONDS):
        yield


@contextmanager
def changing(folder: Path, uri: str) -> Iterator[State]:
    """The state of a folder for one place; what is changed about it is kept."""
    with delivering(folder):
        file = state_file(folder, uri)
        state = read_state(file)
        assert state is not None
        yield state
        state.write(file)


def our_status(status: str) -> str:
    """A record's word for MLflow's."""
    return next(ours for ours, theirs in MLFLOW_STATUS.items() if theirs == status)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's and not a run's."""
    return folder.parent.name == SWEEPS


def writer_lock(folder: Path) -> Path:
    """The lock that the process of a run, or of a sweep, holds as long as it lives."""
    return folder.with_name(f"{folder.name}.lock") if is_sweep(folder) else folder / ".lock"


def is_held(lock: Path) -> bool:
    """Whether some process holds a lock."""
    if not lock.is_file():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def milliseconds(seconds: float | None = None) -> int:
    """MLflow's time, from Python's; now where none is given."""
    return round(1000 * (time.time() if seconds is None else seconds))


def parent_id(folder: Path, tags: Mapping[str, Any], uri: str) -> str | None:
    """The id of the sweep's run that a run belongs below, as far as it is known on disk."""
    if "sweep_id" not in tags or is_sweep(folder):
        return None
    sweep = folder.parent.parent / SWEEPS / str(tags["sweep_id"])
    known = read_state(state_file(sweep, uri))
    return None if known is None or known.uri != uri else known.run_id
