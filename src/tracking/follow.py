"""Mirrors a run folder into MLflow from a background thread while the run trains.

The thread reads metrics.jsonl as it grows. If the tracking server is slow or unreachable, training
is not affected, and everything that the server missed is still on disk.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.common.environment import git_facts, versions
from src.tracking.client import LATER, Server
from src.tracking.new_state import begin
from src.tracking.push import push
from src.tracking.stale_runs import catch_up, close_stale_runs

logger = logging.getLogger(__name__)

POLL_SECONDS = 3.0
MAX_POLL_SECONDS = 60.0
FINISH_SECONDS = 60.0
"""How long a run waits at its end for a slow server."""
CATCH_UP_SECONDS = 10.0
"""The part of this time that sending earlier runs may take."""


class MlflowMirror:
    """Sends one run folder to MLflow while it is being written.

    Args:
        folder: the run folder, which holds config.yaml; this process holds its lock.
        uri: the tracking server or database.
        device: facts about the device, for tags.
        parent_run_id: the MLflow run of the sweep that this run belongs to; None: none.
        warn: shows one line to the user; called at most once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        device: Mapping[str, Any],
        parent_run_id: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self.device, self.parent_run_id = folder, device, parent_run_id
        self.server = Server(uri)
        self.warn = warn
        self._over = threading.Event()
        self._latest_end = float("inf")
        self._warned = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def start(self) -> None:

        self._thread.start()

    def finish(self) -> None:
        """Sends the rest and closes the run; waits at most a minute. record.json is written."""
        self._latest_end = time.monotonic() + CATCH_UP_SECONDS
        self._over.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn_once(TimeoutError("it did not accept everything in time"))

    def _follow(self) -> None:
        try:
            facts = {**git_facts(), "versions": versions(), "device": self.device}
            state = begin(
                self.folder, self.server.uri, facts=facts, parent_run_id=self.parent_run_id
            )
        except Exception as error:  # Whatever goes wrong with tracking, training continues.
            self._warn_once(error)
            return
        delay = POLL_SECONDS
        is_first = True
        while True:
            over = self._over.is_set()
            try:
                push(self.folder, self.server, over=over)
            except Exception as error:
                self._warn_once(error)
                delay = min(2 * delay, MAX_POLL_SECONDS)
            else:
                delay = POLL_SECONDS
                if is_first:
                    is_first = False
                    self._complete_earlier_runs(state.experiment)
            if over:
                return
            self._over.wait(delay)

    def _complete_earlier_runs(self, experiment: str) -> None:
        runs = self.folder.parents[2]
        try:
            close_stale_runs(self.server, experiment)
            if self.parent_run_id is None:
                # Within a sweep, the sweep's own process does this once for all runs.
                catch_up(runs, self.server, go_on=lambda: time.monotonic() < self._latest_end)
        except Exception:  # A problem with an earlier run must not concern this one.
            logger.exception("mlflow: earlier runs")

    def _warn_once(self, error: Exception) -> None:
        line = self.server.trouble(error)
        logger.warning("%s", line, exc_info=error)
        if not self._warned:
            self._warned = True
            self.warn(f"{line}; {LATER}")
