"""`python -m src.reproduce`: the studies of the laboratory book, run again."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.reproduce [studies=NAME | studies=[NAME,NAME]] [n_jobs=2] [plan=true]

Runs the studies of experiments/ again, all of them unless named, says beforehand what that takes
(hours), and compares every run with the committed results.csv: bit by bit, and where the last bits
differ, as on another machine, by statistics. Ctrl-C stops it; the same command goes on.

  studies=[stability,root_cause]   folders of experiments/ that have a study.yaml
  plan=true                        say what would be run, and stop
  n_jobs=2                         runs at a time
  paths.runs=FOLDER                where the runs go; runs unless given
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.lab.book.run_studies import reproduce

        return command_line.plain_main("reproduce", reproduce, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
