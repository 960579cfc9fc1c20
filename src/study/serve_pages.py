"""Serves MLflow's pages and prints the addresses of those that compare the arms of a study."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from src.cli import command_line
from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import DamagedError, InputError
from src.common.orphans import run_bound
from src.common.tracking_address import default_uri, given_uri, with_secrets
from src.study.read.collect import Study, collect
from src.tracking.client import Server, one_line
from src.tracking.push_state import read_state, state_file

CURVE = "val/loss"

MAX_COMPARED = 20
"""Number of runs on one comparison page; with more, MLflow's charts become unreadable."""


def ui(fields: dict[str, Any]) -> int:
    """Prints the addresses and serves MLflow's pages until it is stopped; returns the exit code."""
    port = fields["port"]
    if type(port) is not int or not 1024 <= port <= 65535:
        raise InputError(f"port={port}: must be an integer from 1024 to 65535")
    server = Server(given_uri(fields) or default_uri())
    has_own_pages = server.uri.lower().startswith(("http://", "https://"))
    root = server.uri.rstrip("/") if has_own_pages else f"http://127.0.0.1:{port}"
    study = _study(given_path(fields, "paths.runs"), fields["study"])
    terminal.say(f"all studies: {root}")
    if study is not None:
        try:
            for what, address in comparisons(study, server, root).items():
                terminal.say(f"{study.name}, {what}: {address}")
        except Exception as error:  # The other addresses are useful without these.
            terminal.warn(f"{study.name}: no comparison available ({one_line(error)})")
        report = study.folder / "report" / "report.html"
        if report.is_file():
            terminal.say(f"{study.name}, the report: {report.resolve().as_uri()}")
    if has_own_pages:
        return command_line.OK
    # This also creates a missing database. If MLflow's own server created it, a kill could leave it
    # incomplete.
    problem = server.connection_error()
    if problem is not None:
        terminal.error(server.trouble(problem))
        return command_line.FAILURE
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    # Not as an argument, because every user of this machine can read the arguments of a process.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_secrets(server.uri)
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's job runner serves its features for language models, which are not used here. Without
    # it the server starts three times faster.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    return command_line.OK if run_bound(command) == 0 else command_line.FAILURE


def _study(runs: Path, name: str | None) -> Study | None:
    """The named study, otherwise the one with the latest record; None if there is no record."""
    if name is not None:
        return collect(runs, str(name))
    records = sorted(runs.glob("*/*/seed-*/record.json"), key=lambda file: file.stat().st_mtime)
    try:
        return collect(runs, records[-1].parts[-4]) if records else None
    except DamagedError as error:  # Only a warning, because the user has not named this study.
        terminal.warn(str(error))
        return None


def comparisons(study: Study, server: Server, root: str) -> dict[str, str]:
    """Addresses of MLflow's pages that compare the first seed of each variant, by their content."""
    ids = []
    for variant in study.variants[:MAX_COMPARED]:
        for run in study.of(variant):
            state = read_state(state_file(run.folder, server.uri))
            if state is not None and state.run_id is not None:
                ids.append(state.run_id)
                break
    values = {"runs": ids, "experiments": [server.experiment_id(study.name)]}
    runs = _query(values)
    curves = _query({**values, "metric": CURVE, "plot_metric_keys": [CURVE]})
    return {
        "arms compared": f"{root}/#/compare-runs?{runs}",
        "curves of validation loss": f"{root}/#/metric?{curves}&x_axis=step",
    }


def _query(values: dict[str, Any]) -> str:
    return "&".join(f"{name}={quote(json.dumps(value))}" for name, value in values.items())
