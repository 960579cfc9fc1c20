"""`python -m src.ui`: serves MLflow's pages and prints those that compare the arms of a study."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.ui [study=NAME] [port=5000]

Starts MLflow's pages at http://127.0.0.1:PORT, reachable from this machine only, and prints the
addresses of pages that compare the arms of a study, with the first seed of each. Ctrl-C ends it.

  study=NAME       the study to compare; default: the one that was run last
  paths.runs=runs  tracking.uri=sqlite:///mlflow.db|http://...
"""


def _ui(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.study.serve_pages import ui

    return ui(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("ui", _ui, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
