"""`python -m src.ui`: MLflow on 127.0.0.1, with the address of each study's comparison."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from src.cli import command_line, interrupt
from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import DamagedError, InputError
from src.common.orphans import run_bound
from src.common.tracking_address import default_uri, given_uri, with_secrets
from src.study.read.collect import Study, collect
from src.tracking.client import Server, one_line
from src.tracking.push_state import read_state, state_file

USAGE = """
python -m src.ui [study=NAME] [port=5000]

Starts MLflow's pages at http://127.0.0.1:PORT, for this machine alone, and prints the address at
which the arms of a study are compared: one run of each, the first seed. Ctrl-C ends it.

  study=NAME       that study first; without it the one that was run last
  paths.runs=runs  tracking.uri=sqlite:///mlflow.db|http://...
"""

CURVE = "val/loss"

MAX_COMPARED = 20
"""Runs on one page of comparison; MLflow's charts become unreadable with more."""


def ui(fields: dict[str, Any]) -> int:
    """Prints the addresses and serves until it is stopped."""
    port = fields["port"]
    if type(port) is not int or not 1024 <= port <= 65535:
        raise InputError(f"port={port}: must be an integer from 1024 to 65535")
    server = Server(given_uri(fields) or default_uri())
    serves_itself = server.uri.lower().startswith(("http://", "https://"))
    root = server.uri.rstrip("/") if serves_itself else f"http://127.0.0.1:{port}"
    study = _study(given_path(fields, "paths.runs"), fields["study"])
    terminal.say(f"all studies: {root}")
    if study is not None:
        try:
            for what, address in comparisons(study, server, root).items():
                terminal.say(f"{study.name}, {what}: {address}")
        except Exception as error:  # an address less is no reason not to show the rest
            terminal.warn(f"{study.name}: its comparison is not to be had ({one_line(error)})")
        report = study.folder / "report" / "report.html"
        if report.is_file():
            terminal.say(f"{study.name}, the report: {report.resolve().as_uri()}")
    if serves_itself:
        return command_line.OK
    # A database is made here and not by MLflow's server, which a kill could leave half made.
    silence = server.silence()
    if silence is not None:
        terminal.error(server.trouble(silence))
        return command_line.FAILURE
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    # Not as an argument: everyone on this machine can read those.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_secrets(server.uri)
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Of its models of language, which nothing here asks for; it starts three times faster without.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    return command_line.OK if run_bound(command) == 0 else command_line.FAILURE


def _study(runs: Path, name: str | None) -> Study | None:
    """The study that is named, else the one whose record is the youngest; None without any."""
    if name is not None:
        return collect(runs, str(name))
    records = sorted(runs.glob("*/*/seed-*/record.json"), key=lambda file: file.stat().st_mtime)
    try:
        return collect(runs, records[-1].parts[-4]) if records else None
    except DamagedError as error:  # nobody has asked for this study
        terminal.warn(str(error))
        return None


def comparisons(study: Study, server: Server, root: str) -> dict[str, str]:
    """Addresses in MLflow that compare one run of each variant, the first seed: table, curves."""
    ids = []
    for variant in study.variants[:MAX_COMPARED]:
        for run in study.of(variant):
            state = read_state(state_file(run.folder, server.uri))
            if state is not None and state.run_id is not None:
                ids.append(state.run_id)
                break
    values = {"runs": ids, "experiments": [server.experiment_id(study.name)]}
    chosen = _query(values)
    curves = _query({**values, "metric": CURVE, "plot_metric_keys": [CURVE]})
    return {
        "arms compared": f"{root}/#/compare-runs?{chosen}",
        "curves of validation loss": f"{root}/#/metric?{curves}&x_axis=step",
    }


def _query(values: dict[str, Any]) -> str:
    return "&".join(f"{name}={quote(json.dumps(value))}" for name, value in values.items())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        return command_line.plain_main("ui", ui, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
