"""A client of an MLflow server or database, with the few requests that mirroring needs."""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from src.common.tracking_address import (
    ADVICE,
    SQLITE,
    database_of,
    masked,
    wants_secret,
    with_secrets,
    without_secrets,
)
from src.tracking.database import ensure_database

LATER = "nothing is lost: python -m src.sync sends the rest later"

KIND = "mlflow.experimentKind"
"""The tag that makes MLflow's pages show training runs first, instead of traces of chats."""
MODEL_TRAINING = "custom_model_development"

MAX_METRICS = 1000
MAX_ENTRIES = 100
MAX_PARAM = 6000
MAX_TAG = 8000

_GONE = "RESOURCE_DOES_NOT_EXIST"
_SETTINGS = {
    # By default MLflow retries an unreachable server for minutes. Callers that can wait longer
    # retry themselves.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Otherwise MLflow prints a link for every run that is closed.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_LEVELS = {
    "mlflow": "WARNING",
    # Logs a traceback if the database is locked or full, which `Server.trouble` says in one line.
    "mlflow.store.db.utils": "CRITICAL",
    "alembic": "WARNING",
    "urllib3": "ERROR",
}


def one_line(error: Exception) -> str:
    """The reason for an error, short enough for one line."""
    text = masked(str(error).strip())
    # If no server answers, only the last few words of a request's long message are the reason.
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)|(timed out)", text)
    if reason is not None and "HTTPConnectionPool" in text:
        return reason[0].rpartition("] ")[2]
    return text.splitlines()[0][:200] if text else type(error).__name__


class Server:
    """A server or database. It connects at the first request.

    Every request may raise any exception of MLflow and of the libraries below it.

    Attributes:
        uri: the address without secrets; the path of a database is absolute, so that it means the
            same in every working directory.
    """

    def __init__(self, uri: str) -> None:
        uri = without_secrets(uri)
        if uri.startswith(SQLITE):
            uri = f"{SQLITE}{database_of(uri)}"
        self.uri = uri
        self._client: Any = None

    def trouble(self, error: Exception) -> str:
        """An error as one line for the user."""
        reason = one_line(error)
        line = f"MLflow at {self.uri} cannot be reached or written ({reason})"
        return f"{line}; {ADVICE}" if wants_secret(reason) else line

    @property
    def client(self) -> Any:
        """The MlflowClient; the first access connects."""
        if self._client is None:
            self._client = _connect(with_secrets(self.uri))
        return self._client

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, which is created if it is missing and restored if deleted."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                location, tags = self._artifacts(name), {KIND: MODEL_TRAINING}
                made = self.client.create_experiment(name, artifact_location=location, tags=tags)
                return str(made)
            except MlflowException:
                # Another process may have created it in the meantime.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Where to store artifacts: beside a database; None for a server, which decides itself."""
        if not self.uri.startswith(SQLITE):
            return None
        database = Path(self.uri.removeprefix(SQLITE))
        return f"{(database.parent / 'mlartifacts').as_uri()}/{experiment}"

    def run(self, run_id: str) -> Any:
        """A run; None if the server has no run of this id."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == _GONE:
                return None
            raise

    def search(self, experiment: str, condition: str) -> list[Any]:
        """The runs of an experiment that match a filter in MLflow's grammar."""
        found: list[Any] = []
        token = None
        ids = [self.experiment_id(experiment)]
        while True:
            page = self.client.search_runs(ids, filter_string=condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def log(
        self,
        run_id: str,
        *,
        metrics: Iterable[tuple[str, float, int, int]] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Sends metrics, params and tags in batches of the sizes that MLflow accepts.

        Args:
            run_id: the run's id.
            metrics: name, value, time in milliseconds, step. MLflow stores the same four only once.
            params: by name.
            tags: by name.
        """
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*point) for point in metrics]
        for begin in range(0, len(points), MAX_METRICS):
            self.client.log_batch(run_id, metrics=points[begin : begin + MAX_METRICS])
        run_params = [Param(key, str(value)[:MAX_PARAM]) for key, value in (params or {}).items()]
        for begin in range(0, len(run_params), MAX_ENTRIES):
            self.client.log_batch(run_id, params=run_params[begin : begin + MAX_ENTRIES])
        run_tags = [RunTag(key, str(value)[:MAX_TAG]) for key, value in (tags or {}).items()]
        for begin in range(0, len(run_tags), MAX_ENTRIES):
            self.client.log_batch(run_id, tags=run_tags[begin : begin + MAX_ENTRIES])

    def connection_error(self) -> Exception | None:
        """Why the server does not answer; None if it does."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception as error:
            return error
        return None


def _connect(uri: str) -> Any:
    """Creates a client, and the database if it is missing."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # Before the import, which may log; creating a database and retrying a request are not news.
    for noisy, level in _LEVELS.items():
        logging.getLogger(noisy).setLevel(level)
    import mlflow

    # And again after it, because the import sets the level.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if uri.startswith(SQLITE):
        ensure_database(Path(uri.removeprefix(SQLITE)))
    return mlflow.MlflowClient(tracking_uri=uri)


def bounded(action: Callable[[], Any], seconds: float) -> None:
    """Runs an action for at most `seconds`; raises what it raises, or TimeoutError.

    On a time-out the action goes on in its thread, which cannot be stopped.
    """
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
