"""`python -m src.book`: brings what studies have shown into experiments/."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.book [studies=NAME | studies=[NAME,NAME]] [paths.runs=FOLDER]

Writes results.csv, arms.csv and figures of the studies named, from their runs, into experiments/,
and makes every page anew that has a template beside it (README.md.jinja), with the figures that the
results give. Without studies it makes the pages alone.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.lab.book.run_studies import write_book

        return command_line.plain_main("book", write_book, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
