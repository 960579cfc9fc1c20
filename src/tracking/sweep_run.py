"""The MLflow run of a sweep, the parent of the MLflow runs of its runs.

How a sweep uses it:

    with filelock.FileLock(lock_file(folder, sweep_id), timeout=0):  # held by the caller
        parent = SweepRun(uri=..., experiment=study, sweep_id=sweep_id, folder=folder)
        run_id = parent.open(command=..., description=...)            # before any run starts
        # each run: tracking.parent_run_id=<run_id or null> tracking.sweep_id=<sweep_id>
        parent.adopt(run_folder)          # a run that had finished before the sweep
        close_run(run_folder, "KILLED")   # a run whose process died without closing it
        parent.close("FINISHED", metrics={...}, artifacts=[...], tags={...})

Problems with MLflow raise no exception here, and every call is limited in time.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common import terminal
from src.tracking.client import LATER, Server, bounded
from src.tracking.compare_view import NoRunsError, write_view
from src.tracking.new_state import begin_sweep, ensure_state
from src.tracking.push import push
from src.tracking.push_state import (
    RUNNING,
    SWEEPS,
    State,
    changing,
    is_held,
    milliseconds,
    read_state,
    state_file,
    writer_lock,
)
from src.tracking.stale_runs import RUN_SECONDS, catch_up, close_stale_runs

logger = logging.getLogger(__name__)

OPEN_SECONDS = 45.0
"""Creating a database takes about ten of these."""
CLOSE_SECONDS = 60.0
CATCH_UP_SECONDS = 10.0


def lock_file(folder: Path, sweep_id: str) -> Path:
    """The filelock that the process of a sweep holds as long as it lives; `folder` is .sweeps."""
    return writer_lock(folder / sweep_id)


class SweepRun:
    """The parent run of a sweep in MLflow. Running the same sweep again reopens it.

    The caller holds `lock_file(folder, sweep_id)` from before `open` until after `close`, by which
    other processes see that the sweep is alive.

    Args:
        uri: the tracking server or database (`default_uri()` unless tracking.uri is typed).
        experiment: the name of the experiment, which is the study.
        sweep_id: the id of the sweep, without path separators.
        folder: runs/<study>/.sweeps; the state is kept in <folder>/<sweep_id>/mlflow.json.
        warn: shows one line to the user; called at most once.
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
        self._is_unreachable = self._warned = False
        self._helper: threading.Thread | None = None
        self._latest_end = math.inf

    def open(self, *, command: str, description: str = "") -> str | None:
        """Creates database, experiment and run, or reopens the run; closes stale runs.

        What the server has missed of earlier runs is sent in the background.

        Returns:
            The id for tracking.parent_run_id. None if the server is unreachable: a warning is
            shown, and `close` or `python -m src.sync` creates the run later and adds the sweep's
            runs to it.
        """
        assert is_held(writer_lock(self.folder)), "the caller must hold the sweep's lock"
        uri, experiment = self.server.uri, self.experiment

        def act() -> None:
            begin_sweep(self.folder, uri, experiment, command=command, description=description)
            push(self.folder, self.server, over=False)
            close_stale_runs(self.server, experiment)

        if not self._try(act, OPEN_SECONDS):
            return None
        self._helper = threading.Thread(target=self._catch_up, name="mlflow-catch-up", daemon=True)
        self._helper.start()
        return self._state().run_id

    def _state(self) -> State:
        state = read_state(state_file(self.folder, self.server.uri))
        assert state is not None, "open() must be called first"
        return state

    def _catch_up(self) -> None:
        try:
            catch_up(self.runs, self.server, go_on=lambda: time.monotonic() < self._latest_end)
        except Exception:  # A problem with an earlier run must not concern this sweep.
            logger.info("mlflow: earlier runs", exc_info=True)

    def adopt(self, run_folder: Path) -> None:
        """Makes a run that had finished before the sweep a child of this run."""
        uri = self.server.uri

        def act() -> None:
            ensure_state(run_folder, uri)
            with changing(run_folder, uri) as state:
                if state.tags.get("sweep_id") != self.sweep_id:
                    state.tags["sweep_id"] = self.sweep_id
                    state.described = False
            if not self._is_unreachable:
                push(run_folder, self.server, over=True)

        self._try(act, RUN_SECONDS)

    def close(
        self,
        status: str,
        *,
        metrics: Mapping[str, float] | None = None,
        artifacts: Sequence[Path] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Logs the sweep's metrics, uploads its files, closes the run, and writes the study's view.

        Args:
            status: MLflow's status: FINISHED, FAILED or KILLED.
            metrics: by name; non-finite values are left out.
            artifacts: files, and folders with everything in them; they keep their names.
            tags: by name.
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
            # Runs that trained while this parent could not be created are not below it yet.
            self._catch_up()
            with contextlib.suppress(NoRunsError):
                write_view(self.server, self.experiment)

        self._try(act, CLOSE_SECONDS)

    def _try(self, action: Callable[[], Any], seconds: float) -> bool:
        """Whether the action succeeded in time; the first failure shows a warning."""
        try:
            bounded(action, seconds)
        except Exception as error:  # Whatever goes wrong with tracking, the sweep continues.
            self._is_unreachable = True
            if not self._warned:
                self._warned = True
                self.warn(f"{self.server.trouble(error)}; {LATER}")
            return False
        return True
