"""`python -m src.sync`: brings into MLflow what it has missed."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.sync [study=NAME] [paths.runs=FOLDER] [tracking.uri=URI]

Brings into MLflow what a server that was away has missed of the runs in FOLDER: metrics, ends,
files. The run folders say what that is; what is there already is not sent again, and a run in
progress is left to itself.

  study=NAME          that study alone
  tracking.uri=URI    everything to that server or database, runs with tracking=local too;
                      without it each run goes where it was meant to go

A server that wants a password gets it from tracking.uri=http://USER:PASSWORD@HOST, from the same in
MLFLOW_TRACKING_URI, or from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.cli.field_checks import given_path
        from src.common.tracking_address import given_uri
        from src.tracking.sync_folders import sync

        return command_line.plain_main(
            "sync",
            lambda given: sync(
                runs=given_path(given, "paths.runs"),
                study=None if given["study"] is None else str(given["study"]),
                uri=given_uri(given),
            ),
            usage=USAGE,
            argv=argv,
        )


if __name__ == "__main__":
    sys.exit(main())
