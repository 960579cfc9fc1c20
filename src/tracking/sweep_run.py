"""The MLflow run of a sweep, above the runs of its cells.

How a sweep uses it:

    with filelock.FileLock(lock_file(folder, sweep_id), timeout=0):  # held by the caller
        parent = SweepRun(uri=..., experiment=study, sweep_id=sweep_id, folder=folder)
        run_id = parent.open(command=..., description=...)            # before any child starts
        # each child: tracking.parent_run_id=<run_id or null> tracking.sweep_id=<sweep_id>
        parent.adopt(run_folder)            # a cell that is finished already and is not run again
        close_child(run_folder, "KILLED")   # a child that died without closing its own run
        parent.close("FINISHED", metrics={...}, artifacts=[...], tags={...})

Nothing here raises because of MLflow, and everything is bounded in time.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common import terminal
from src.tracking.client import LATER, Server
from src.tracking.new_state import begin_sweep, ensure_state
from src.tracking.push import is_behind, push
from src.tracking.push_state import (
    RUNNING,
    SWEEPS,
    State,
    changing,
    is_held,
    milliseconds,
    read_state,
    state_file,
    state_files,
    writer_lock,
)
from src.tracking.stale_runs import catch_up, mend

logger = logging.getLogger(__name__)

OPEN_SECONDS = 45.0
"""A fresh database takes ten of them."""
CLOSE_SECONDS = 60.0
CHILD_SECONDS = 20.0
CATCH_UP_SECONDS = 10.0


def lock_file(folder: Path, sweep_id: str) -> Path:
    """What the process of a sweep holds (a filelock) as long as it lives; `folder` is .sweeps."""
    return writer_lock(folder / sweep_id)


class SweepRun:
    """The parent run of a sweep; the same sweep again reopens it.

    The caller holds `lock_file(folder, sweep_id)` from before `open` until after `close`: by it
    others see that the sweep is alive.

    Args:
        uri: the tracking server or database (`default_uri()` unless tracking.uri is typed).
        experiment: its name; the study.
        sweep_id: of this sweep; no path separators.
        folder: runs/<study>/.sweeps; what is sent is kept in <folder>/<sweep_id>/mlflow.json.
        warn: shows one line to the user; called once at most.
    """

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        sweep_id: str,
        folder: Path,
        warn: Callable[[str], None] = terminal.warn,
    ) -> None:
        assert folder.name == SWEEPS
        self.server = Server(uri)
        self.experiment, self.sweep_id = experiment, sweep_id
        self.folder = folder / sweep_id
        self.runs = folder.parent.parent
        self.warn = warn
        self._is_away = self._warned = False
        self._helper: threading.Thread | None = None
        self._latest_end = math.inf

    def open(self, *, command: str, description: str = "") -> str | None:
        """Creates database, experiment and run, or reopens the run; mends what others left.

        What the server has missed of earlier runs follows in the background.

        Returns:
            The run's id for tracking.parent_run_id; None where the server is away: then one line
            warned, and `close` or `python -m src.sync` makes the run and gathers its children.
        """
        assert is_held(writer_lock(self.folder)), "the caller holds the sweep's lock"
        uri, experiment = self.server.uri, self.experiment

        def act() -> None:
            begin_sweep(self.folder, uri, experiment, command=command, description=description)
            push(self.folder, self.server, over=False)
            mend(self.server, experiment)

        if not self._try(act, OPEN_SECONDS):
            return None
        self._helper = threading.Thread(target=self._catch_up, name="mlflow-catch-up", daemon=True)
        self._helper.start()
        return self._state().run_id

    def _state(self) -> State:
        state = read_state(state_file(self.folder, self.server.uri))
        assert state is not None, "open comes first"
        return state

    def _catch_up(self) -> None:
        try:
            catch_up(self.runs, self.server, go_on=lambda: time.monotonic() < self._latest_end)
        except Exception:  # the trouble of earlier runs is not this sweep's
            logger.info("mlflow: earlier runs", exc_info=True)

    def adopt(self, run_folder: Path) -> None:
        """Gives a run that this sweep found finished to this parent."""
        uri = self.server.uri

        def act() -> None:
            ensure_state(run_folder, uri)
            with changing(run_folder, uri) as state:
                if state.tags.get("sweep_id") != self.sweep_id:
                    state.tags["sweep_id"] = self.sweep_id
                    state.described = False
            if not self._is_away:
                push(run_folder, self.server, over=True)

        self._try(act, CHILD_SECONDS)

    def close(
        self,
        status: str,
        *,
        metrics: Mapping[str, float] | None = None,
        artifacts: Sequence[Path] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Logs headline figures, uploads files and folders under report/, and closes the run.

        Args:
            status: MLflow's: FINISHED, FAILED or KILLED.
            metrics: by name; what is not finite is left out.
            artifacts: files, or folders with all that is in them, which keep their names.
            tags: such as status.
        """
        assert status != RUNNING
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        self._latest_end = time.monotonic() + CATCH_UP_SECONDS

        def act() -> None:
            with changing(self.folder, self.server.uri) as state:
                state.status, state.closed, state.ended = status, False, milliseconds()
                state.metrics = finite
                state.artifacts = [str(path.resolve()) for path in artifacts]
                state.tags |= {name: str(value) for name, value in (tags or {}).items()}
            if self._helper is not None:
                self._helper.join(CATCH_UP_SECONDS)
            push(self.folder, self.server, over=True)
            # Children that ran while this run could not be made do not know it yet.
            self._catch_up()

        self._try(act, CLOSE_SECONDS)

    def _try(self, action: Callable[[], Any], seconds: float) -> bool:
        """Whether it was done in time; where it was not, one line warns, the first time."""
        try:
            bounded(action, seconds)
        except Exception as error:  # whatever goes wrong there, the sweep goes on
            self._is_away = True
            if not self._warned:
                self._warned = True
                self.warn(f"{self.server.trouble(error)}; {LATER}")
            return False
        return True


def close_child(folder: Path, status: str) -> None:
    """Closes the MLflow run of a run folder whose process died without doing so.

    A record that the process still wrote is believed before `status`, which is MLflow's KILLED or
    FAILED. Does nothing where there is no MLflow run, it is closed already, or the folder has a
    new writer. What a server that is away misses, src.sync brings.
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
        bounded(act, CHILD_SECONDS)
    except Exception:  # the folder says what is to be sent
        logger.info("mlflow: %s", folder, exc_info=True)


def bounded(action: Callable[[], Any], seconds: float) -> None:
    """Waits so long for an action and no longer; raises what it raises, or TimeoutError."""
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=act, name="mlflow", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if raised:
        raise raised[0]
