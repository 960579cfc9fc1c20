"""Which studies there are, and which of them is meant. Reads no file and imports nothing heavy.

`python -m src.study.read.find_study [NAME]` prints the name for the Makefile.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from src.cli import interrupt
from src.common import terminal
from src.common.errors import InputError, nearest
from src.common.run_folder import check_study

HOW_TO_MAKE_RUNS = "type make train for one run, or make ablate for a study"


def run_folders(study: Path) -> list[Path]:
    """The run folders of a study, sorted."""
    return [
        file.parent
        for file in sorted(study.glob("*/seed-*/config.yaml"))
        # The name of a folder that rerun=true moved aside contains the time.
        if "." not in file.parent.name
    ]


def check_has_runs(runs: Path, name: str) -> None:
    """Raises InputError if a study has no runs, with the names of those that have."""
    check_study(name)
    if run_folders(runs / name):
        return
    others = sorted(path.name for path in runs.glob("*") if any(path.glob("*/seed-*")))
    listed = ", ".join(others) or f"none yet; {HOW_TO_MAKE_RUNS}"
    hint = nearest(name, others)
    raise InputError(f"study={name}: has no runs in {runs} ({hint}allowed: {listed})")


def latest_study(runs: Path) -> str | None:
    """The study of the latest record; None if there is none."""
    records = sorted(runs.glob("*/*/seed-*/record.json"), key=lambda file: file.stat().st_mtime)
    return records[-1].parts[-4] if records else None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the named study if it has runs, else the latest; returns the exit code."""
    given, runs = (sys.argv[1:] if argv is None else argv), Path("runs")
    try:
        if given:
            check_has_runs(runs, given[0])
        name = given[0] if given else latest_study(runs)
        if name is None:
            raise InputError(f"STUDY: there are no runs in {runs} yet; {HOW_TO_MAKE_RUNS}")
    except InputError as error:
        terminal.error(str(error))
        return 2
    if not given:
        # On standard error, because the Makefile reads standard output.
        print(f"study {name}, the latest; type STUDY=NAME for another", file=sys.stderr)
    print(name)
    return 0


if __name__ == "__main__":
    with interrupt.quiet_interrupt():
        sys.exit(main())
