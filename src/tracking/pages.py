"""Short addresses beside MLflow's own: /compare/STUDY opens the view that compares a study's arms.

`mlflow server --app-name compare` finds this app by its entry point in pyproject.toml, which is how
MLflow is meant to be extended.
"""

import html
import json
import os
from importlib.metadata import entry_points
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route

from src.common.tracking_address import SERVED, fingerprint
from src.tracking.compare_view import CHARTS_QUERY

APP = "compare"

STORE = "MLFLOW_BACKEND_STORE_URI"
"""The environment variable from which MLflow's server reads the address of its database."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>{study}</title>
<body><p id="said">Opening {study} ...</p>
<script>
const choose = (key, value) => localStorage.getItem(key) ?? localStorage.setItem(key, value);
// MLflow shows its menu for training runs, and opens its chat assistant only at a click.
choose("mlflow.workflowType_v1", '"machine_learning"');
choose("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
const name = {name};
fetch("../ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=" + encodeURIComponent(name))
  .then((answer) => answer.json())
  .then((found) => `../#/experiments/${{found.experiment.experiment_id}}/runs?{query}`)
  .then((address) => location.replace(address))
  .catch(() => (document.getElementById("said").textContent = `MLflow has no study ${{name}}.`));
</script>
</html>
"""


def compare(request: Request) -> HTMLResponse:
    """A page that leads to the view of a study."""
    study = request.path_params["study"]
    # Escaped, so that no HTML element can begin inside the script.
    name = json.dumps(study).replace("<", "\\u003c")
    return HTMLResponse(PAGE.format(study=html.escape(study), name=name, query=CHARTS_QUERY))


def served(_: Request) -> PlainTextResponse:
    """Which database these pages show, for a command that would start them a second time."""
    return PlainTextResponse(fingerprint(os.environ.get(STORE, "")))


def create_app() -> Any:
    """MLflow's app with our address before its own, of which the last takes every address."""
    # Imported here, because the process that starts the server looks at this module too.
    from mlflow.server.fastapi_app import app

    app.router.routes.insert(0, Route("/compare/{study}", compare))
    app.router.routes.insert(0, Route(SERVED, served))
    return app


def is_installed() -> bool:
    """Whether MLflow can find this app: the project is installed, not only on the path."""
    return any(point.name == APP for point in entry_points(group="mlflow.app"))
