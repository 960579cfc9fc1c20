"""Reads the runs of an MLflow experiment, whoever logged them."""

from typing import Any

from src.common.errors import InputError, nearest
from src.tracking.client import Server


def experiment_runs(name: str, uri: str) -> list[dict[str, Any]]:
    """The ended runs of an experiment, each as a dict of `metrics`, `params` and `tags`.

    Args:
        name: the experiment.
        uri: the server or database.

    Raises:
        InputError: there is no such experiment, or the server cannot be read.
    """
    from mlflow.exceptions import MlflowException

    server = Server(uri)
    try:
        found = server.client.get_experiment_by_name(name)
        if found is None:
            known = [each.name for each in server.client.search_experiments()]
            raise InputError(
                f"mlflow={name}: no such experiment at {server.uri};"
                f" {nearest(name, known)}known: {', '.join(known)}"
            )
        runs = server.search(name, "")
    except (MlflowException, OSError) as error:
        raise InputError(server.trouble(error)) from error
    return [
        {"metrics": run.data.metrics, "params": run.data.params, "tags": run.data.tags}
        for run in runs
        if run.info.status in ("FINISHED", "FAILED")
    ]
