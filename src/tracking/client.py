"""A tracking server or database: the few requests that a mirror makes of it."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
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
from src.tracking.database import ensure

LATER = "nothing is lost: python -m src.sync brings the rest"

KIND = "mlflow.experimentKind"
"""The tag by which MLflow's pages open on training runs and not on traces of chats."""

MAX_METRICS = 1000
MAX_ENTRIES = 100
MAX_PARAM = 6000
MAX_TAG = 8000

_GONE = "RESOURCE_DOES_NOT_EXIST"
_SETTINGS = {
    # Without these an unreachable server is tried for minutes; who waits longer asks again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # A link for every run that is closed is no news.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_LEVELS = {
    "mlflow": "WARNING",
    # Prints a traceback for a database that is locked or full; we say that in one line.
    "mlflow.store.db.utils": "CRITICAL",
    "alembic": "WARNING",
    "urllib3": "ERROR",
}


def one_line(error: Exception) -> str:
    """The reason of a failure, short enough for a line."""
    text = masked(str(error).strip())
    # Of what a request says when nobody answers, the last few words are the reason.
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)|(timed out)", text)
    if reason is not None and "HTTPConnectionPool" in text:
        return reason[0].rpartition("] ")[2]
    return text.splitlines()[0][:200] if text else type(error).__name__


class Server:
    """Connects when it is first asked for something; every request may raise whatever MLflow does.

    Attributes:
        uri: without secrets, and with a database's path made absolute, so that it means the same
            everywhere.
    """

    def __init__(self, uri: str) -> None:
        uri = without_secrets(uri)
        if uri.startswith(SQLITE):
            uri = f"{SQLITE}{database_of(uri)}"
        self.uri = uri
        self._client: Any = None

    def trouble(self, error: Exception) -> str:
        """A line for people."""
        reason = one_line(error)
        line = f"MLflow at {self.uri} cannot be reached or written ({reason})"
        return f"{line}; {ADVICE}" if wants_secret(reason) else line

    @property
    def client(self) -> Any:
        """The MlflowClient."""
        if self._client is None:
            self._client = _connect(with_secrets(self.uri))
        return self._client

    def experiment_id(self, name: str) -> str:
        """The experiment's id; it is made where it is missing, and taken back where deleted."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                location, tags = self._artifacts(name), {KIND: "custom_model_development"}
                made = self.client.create_experiment(name, artifact_location=location, tags=tags)
                return str(made)
            except MlflowException:
                # Another process may have made it in between.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Beside a database; a server knows its own place."""
        if not self.uri.startswith(SQLITE):
            return None
        database = Path(self.uri.removeprefix(SQLITE))
        return f"{(database.parent / 'mlartifacts').as_uri()}/{experiment}"

    def run(self, run_id: str) -> Any:
        """A run, or None where the server knows of none such."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == _GONE:
                return None
            raise

    def search(self, experiment: str, condition: str) -> list[Any]:
        """The runs of an experiment that meet a condition in MLflow's grammar."""
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
        """Sends in the batches that MLflow takes.

        Args:
            run_id: of the run.
            metrics: name, value, time in milliseconds, step. The same four again are one row.
            params: by name.
            tags: by name.
        """
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*point) for point in metrics]
        for begin in range(0, len(points), MAX_METRICS):
            self.client.log_batch(run_id, metrics=points[begin : begin + MAX_METRICS])
        given = [Param(key, str(value)[:MAX_PARAM]) for key, value in (params or {}).items()]
        for begin in range(0, len(given), MAX_ENTRIES):
            self.client.log_batch(run_id, params=given[begin : begin + MAX_ENTRIES])
        named = [RunTag(key, str(value)[:MAX_TAG]) for key, value in (tags or {}).items()]
        for begin in range(0, len(named), MAX_ENTRIES):
            self.client.log_batch(run_id, tags=named[begin : begin + MAX_ENTRIES])

    def silence(self) -> Exception | None:
        """Why it cannot be reached; None where it answers, so that trouble is with one run."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception as error:
            return error
        return None


def _connect(uri: str) -> Any:
    """A client; the database is made where it is missing."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # Quiet before the import: creating a database is no news, and each retry of a request neither.
    for noisy, level in _LEVELS.items():
        logging.getLogger(noisy).setLevel(level)
    import mlflow

    # And after it, because the import sets the level anew.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if uri.startswith(SQLITE):
        ensure(Path(uri.removeprefix(SQLITE)))
    return mlflow.MlflowClient(tracking_uri=uri)
