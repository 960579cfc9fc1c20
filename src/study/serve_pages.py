"""Serves MLflow's pages, and prints and opens the one that compares the arms of a study."""

import os
import sys
import threading
import time
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from src.cli import command_line
from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import DamagedError
from src.common.orphans import run_bound
from src.common.tracking_address import default_uri, given_uri, with_secrets
from src.study.before_serving import has_own_pages
from src.study.read.collect import Study, collect
from src.study.read.find_study import latest_study
from src.tracking import pages
from src.tracking.client import Server, one_line
from src.tracking.compare_view import write_view

START_SECONDS = 120.0
"""How long to wait for MLflow's server before the browser is opened."""


def ui(fields: dict[str, Any]) -> int:
    """Prints the addresses and serves MLflow's pages until it is stopped; returns the exit code.

    Args:
        fields: as `running_server` has checked them.
    """
    port, must_open = fields["port"], fields["open"]
    server = Server(given_uri(fields) or default_uri())
    is_served = has_own_pages(server.uri)
    root = server.uri.rstrip("/") if is_served else f"http://127.0.0.1:{port}"
    is_ours = not is_served and pages.is_installed()
    study = _study(given_path(fields, "paths.runs"), fields["study"])
    first = root
    if study is not None:
        try:
            view = write_view(server, study.name)
        except Exception as error:  # The other addresses are useful without these.
            terminal.warn(f"{study.name}: no comparison available ({one_line(error)})")
        else:
            addresses = {what: f"{root}/{link}" for what, link in view.links().items()}
            # The report on disk, whose links to runs work, is shown below.
            addresses.pop("report", None)
            if is_ours:
                addresses["arms compared"] = f"{root}/compare/{quote(study.name)}"
            first = addresses["arms compared"]
            for what, address in addresses.items():
                terminal.say(f"{study.name}, {what}: {address}")
        report = study.folder / "report" / "report.html"
        if report.is_file():
            terminal.say(f"{study.name}, report: {report.resolve().as_uri()}")
    terminal.say(f"all studies: {root}")
    if not is_served:
        terminal.say("Ctrl-C ends the server")
    if is_served:
        if must_open:
            webbrowser.open(first)
        return command_line.OK
    # This also creates a missing database. If MLflow's own server created it, a kill could leave it
    # incomplete.
    problem = server.connection_error()
    if problem is not None:
        terminal.error(server.trouble(problem))
        return command_line.FAILURE
    if must_open:
        threading.Thread(target=_open, args=(root, first), daemon=True).start()
    return _serve(server, port, app=pages.APP if is_ours else None)


def _serve(server: Server, port: int, *, app: str | None) -> int:
    """Runs MLflow's server until it is stopped; returns the exit code."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    # A line for each request would push the addresses above out of sight.
    command += ["--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    command += [] if app is None else ["--app-name", app]
    # Not as an argument, because every user of this machine can read the arguments of a process.
    os.environ[pages.STORE] = with_secrets(server.uri)
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's job runner serves its features for language models, which are not used here. Without
    # it the server starts three times faster.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    return command_line.OK if run_bound(command) == 0 else command_line.FAILURE


def _open(root: str, address: str) -> None:
    """Opens a page in the browser as soon as the server answers."""
    latest = time.monotonic() + START_SECONDS
    while time.monotonic() < latest:
        try:
            with urllib.request.urlopen(f"{root}/health", timeout=2.0):
                break
        except OSError:
            time.sleep(0.3)
    else:
        return
    webbrowser.open(address)


def _study(runs: Path, name: str | None) -> Study | None:
    """The named study, otherwise the one with the latest record; None if there is no record."""
    if name is not None:
        return collect(runs, str(name))
    latest = latest_study(runs)
    try:
        return None if latest is None else collect(runs, latest)
    except DamagedError as error:  # Only a warning, because the user has not named this study.
        terminal.warn(str(error))
        return None
