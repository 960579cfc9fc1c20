"""`python -m src.sync`: sends MLflow what it has missed."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.sync [study=NAME] [paths.runs=FOLDER] [tracking.uri=URI]

Sends MLflow everything that it lacks of the runs in FOLDER, for example because the server was
unreachable: metrics, results and files. Nothing is sent twice. Runs in progress are skipped.

  study=NAME          only this study
  paths.runs=FOLDER   folder of all runs; default: runs
  tracking.uri=URI    send all runs to this server or database, including runs with tracking=local;
                      default: each run's own server

If the server needs a password, type tracking.uri=http://USER:PASSWORD@HOST, set MLFLOW_TRACKING_URI
to such an address, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""


def _sync(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.cli.field_checks import given_path
        from src.common.tracking_address import given_uri
        from src.tracking.sync_folders import sync

    return sync(
        runs=given_path(fields, "paths.runs"),
        study=None if fields["study"] is None else str(fields["study"]),
        uri=given_uri(fields),
    )


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("sync", _sync, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
