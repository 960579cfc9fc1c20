"""MLflow as a mirror of the run folder, filled by a thread of its own.

The thread reads metrics.jsonl as it grows. A tracking server that is slow or away therefore never
slows or stops training, and what it missed is still on disk.
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
from src.tracking.stale_runs import catch_up, mend

logger = logging.getLogger(__name__)

POLL_SECONDS = 3.0
MAX_POLL_SECONDS = 60.0
FINISH_SECONDS = 60.0
"""That a run waits at its end for a server that is slow."""
CATCH_UP_SECONDS = 10.0
"""Of these, what earlier runs may take."""


class MlflowMirror:
    """Brings one run folder into MLflow while it is written.

    Args:
        folder: the run folder, with its config.yaml; its lock is held.
        uri: the tracking server or database.
        device: facts about it.
        parent_run_id: the run of the sweep that this run belongs to.
        warn: shows one line to the user.
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
        """Follows the run, in the background."""
        self._thread.start()

    def finish(self) -> None:
        """Sends the rest, once record.json is written, and closes the run; within a minute."""
        self._latest_end = time.monotonic() + CATCH_UP_SECONDS
        self._over.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._complain(TimeoutError("it did not take everything in time"))

    def _follow(self) -> None:
        try:
            facts = {**git_facts(), "versions": versions(), "device": self.device}
            state = begin(
                self.folder, self.server.uri, facts=facts, parent_run_id=self.parent_run_id
            )
        except Exception as error:  # a tracker never stops training, whatever its trouble
            self._complain(error)
            return
        delay = POLL_SECONDS
        is_first = True
        while True:
            over = self._over.is_set()
            try:
                push(self.folder, self.server, over=over)
            except Exception as error:
                self._complain(error)
                delay = min(2 * delay, MAX_POLL_SECONDS)
            else:
                delay = POLL_SECONDS
                if is_first:
                    is_first = False
                    self._look_after_others(state.experiment)
            if over:
                return
            self._over.wait(delay)

    def _look_after_others(self, experiment: str) -> None:
        runs = self.folder.parents[2]
        try:
            mend(self.server, experiment)
            if self.parent_run_id is None:
                # Otherwise the sweep does it for all its runs.
                catch_up(runs, self.server, go_on=lambda: time.monotonic() < self._latest_end)
        except Exception:  # their trouble is not this run's
            logger.exception("mlflow: earlier runs")

    def _complain(self, error: Exception) -> None:
        line = self.server.trouble(error)
        logger.warning("%s", line, exc_info=error)
        if not self._warned:
            self._warned = True
            self.warn(f"{line}; {LATER}")
