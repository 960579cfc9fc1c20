"""`python -m src.ui`: serves MLflow's pages, prints and opens the one that compares the arms."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.ui [study=NAME] [port=5000] [open=true]

Starts MLflow's pages at http://127.0.0.1:PORT, reachable from this machine only, and prints the
addresses of the page that compares the arms of a study and of its report. Ctrl-C ends it.

  study=NAME       the study to compare; default: the one that was run last
  open=true        also opens the page in the browser
  paths.runs=runs  tracking.uri=sqlite:///mlflow.db|http://...
"""


def _ui(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.study.before_serving import running_server

        address = running_server(fields)
        if address is not None:
            return _show_running(address, must_open=fields["open"])
        from src.study.serve_pages import ui

    return ui(fields)


def _show_running(address: str, *, must_open: bool) -> int:
    from src.common import terminal

    terminal.say(f"already running: {address}")
    if must_open:
        import webbrowser

        webbrowser.open(address)
    return 0


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("ui", _ui, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
