"""MLflow as a mirror of the run folder, filled by a thread of its own.

The thread reads metrics.jsonl as it grows. A tracking server that is slow or away therefore never
slows or stops training, and what it missed is still on disk.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock

from src.tracking.folder import read_json, read_metrics, write_json

logger = logging.getLogger(__name__)

POLL_SECONDS = 3.0
FINISH_SECONDS = 60.0
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_VALUE = 6000


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a database at the root of the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


class MlflowMirror:
    """Brings one run folder into MLflow.

    Args:
        folder: the run folder.
        uri: the tracking server or database.
        experiment: its name; the study.
        run_name: of the run.
        tags, params: set once, at the start.
        warn: shows one line to the user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self.uri = folder, uri
        self.experiment, self.run_name = experiment, run_name
        self.tags, self.params, self.warn = tags, params, warn
        self._client: Any = None
        self._state: dict[str, Any] = {}
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def start(self) -> None:
        """Connects and follows, in the background."""
        self._thread.start()

    def finish(self, *, status: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Sends the rest and closes the run; gives up after a minute.

        `status` is MLflow's: FINISHED, FAILED or KILLED.
        """
        self._stop.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._complain("did not take all metrics in time")
        if self._failed or self._thread.is_alive():
            return
        try:
            self._send([{"step": 0, **metrics}])
            for key, value in tags.items():
                self._client.set_tag(self._state["run_id"], key, value)
            for name in ("config.yaml", "record.json", "samples.md"):
                if (self.folder / name).is_file():
                    self._client.log_artifact(self._state["run_id"], str(self.folder / name))
            self._client.set_terminated(self._state["run_id"], status=status)
        except Exception as error:  # whatever goes wrong there, training is done and on disk
            self._complain(str(error))

    def _follow(self) -> None:
        try:
            self._connect()
            while not self._stop.wait(POLL_SECONDS):
                self._catch_up()
            self._catch_up()
        except Exception as error:  # a tracker never stops training, whatever its trouble
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        self._failed = True
        line = reason.strip().splitlines()[0][:200] if reason.strip() else "no reason given"
        logger.warning("mlflow: %s", reason)
        self.warn(f"MLflow at {self.uri} cannot be reached or written ({line}); the run goes on")

    def _connect(self) -> None:
        # Without these an unreachable server is tried for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        client, experiment_id = prepare(self.uri, self.experiment)
        self._client = client
        file = self.folder / "mlflow.json"
        known = read_json(file) or {}
        if known.get("uri") == self.uri and self._exists(known["run_id"]):
            self._state = known
            client.update_run(known["run_id"], status="RUNNING")
        else:
            run = client.create_run(experiment_id, run_name=self.run_name)
            self._state = {"uri": self.uri, "run_id": run.info.run_id, "lines_sent": 0}
            self._send_params()
            write_json(file, self._state)
        for key, value in self.tags.items():
            client.set_tag(self._state["run_id"], key, value)

    def _exists(self, run_id: str) -> bool:
        """Whether a run that was begun is still there; a database may have been deleted."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException:
            return False
        return True

    def _send_params(self) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_VALUE]) for key, value in self.params.items()]
        for begin in range(0, len(params), MAX_PARAMS):
            batch = params[begin : begin + MAX_PARAMS]
            self._client.log_batch(self._state["run_id"], params=batch)

    def _catch_up(self) -> None:
        lines = read_metrics(self.folder / "metrics.jsonl")
        # A resumed run has cut its metrics; the same steps come again with the same values.
        self._send(lines[self._state["lines_sent"] :])
        if len(lines) != self._state["lines_sent"]:
            self._state["lines_sent"] = len(lines)
            write_json(self.folder / "mlflow.json", self._state)

    def _send(self, lines: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [
            Metric(name, value, now, int(line["step"]))
            for line in lines
            for name, value in line.items()
            if name != "step"
        ]
        for begin in range(0, len(entries), MAX_METRICS):
            batch = entries[begin : begin + MAX_METRICS]
            self._client.log_batch(self._state["run_id"], metrics=batch)


def prepare(uri: str, experiment: str) -> tuple[Any, str]:
    """A client and the experiment's id; creates database and experiment where they are missing.

    Under a lock, because processes that migrate one fresh database together all crash.
    """
    # Quiet before the import: creating a database is no news.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    # And after it, because the import sets the level anew.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        client = mlflow.MlflowClient(tracking_uri=uri)
        return client, _experiment_id(client, experiment, artifacts=None)
    database = Path(uri.removeprefix("sqlite:///"))
    with filelock.FileLock(database.with_suffix(".lock")):
        client = mlflow.MlflowClient(tracking_uri=uri)
        artifacts = database.parent / "mlartifacts"
        return client, _experiment_id(client, experiment, artifacts=artifacts)


def _experiment_id(client: Any, name: str, *, artifacts: Path | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None if artifacts is None else f"{artifacts.as_uri()}/{name}"
    return str(client.create_experiment(name, artifact_location=location))
