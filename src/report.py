"""`python -m src.report`: what a study has shown."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.report study=NAME [paths.runs=FOLDER] [out=FOLDER]

Writes the report of a study: report.html (one page, nothing loaded from outside), report.md,
report.csv (a line a run), arms.csv (a line an arm) and figures/, and shows the short table.

  study=NAME           the folder of the study below paths.runs
  paths.runs=FOLDER    where the runs are; runs unless given
  out=FOLDER           where the report goes; <paths.runs>/<study>/report unless given
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.study.report.make_report import report_command

        return command_line.plain_main("report", report_command, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
