"""`python -m src.detect`: how often early warning and incident recorder are right."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.detect [field=value ...]

Trains healthy and failing runs, seconds each, in which one known thing goes wrong, and says how
many of the failures were warned of, how long before, how many warnings were false, and how often
the first operation and the cause were named rightly. Misses are listed.

  seeds=[1000,1001]   the half on which the thresholds of src/nonfinite/early_warning.py are set
  unseen=[2000,2001]  the half that is reported
  n_jobs=2  study=detector  out=FOLDER

About 15 minutes on two cores. Runs that are finished are not trained again: with other thresholds
their figures are gone over anew; after another change, choose another study.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.lab.detector.run_detector import detect

        return command_line.plain_main("detect", detect, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
