"""`python -m src.report`: writes the report of a study."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.report study=NAME [paths.runs=FOLDER] [out=FOLDER] [family=study|baseline]

Writes the report of a study and prints a short table. The report consists of report.html (a single
self-contained page), report.md, report.csv (one line per run), arms.csv (one line per arm) and
figures/.

  study=NAME           name of the study, which is a folder below paths.runs
  paths.runs=FOLDER    folder of all runs; default: runs
  family=study         the arms over which p values are adjusted: all of the study, or with
                       family=baseline those that share a baseline
  out=FOLDER           where to write the report; default: <paths.runs>/<study>/report

Several studies are compared arm by arm, each analysed by itself:

python -m src.report 'studies=[NAME,NAME]' [out=FOLDER] [family=study|baseline]

Runs that were made elsewhere are compared in the same way:

python -m src.report csv=FILE arm=COLUMN seed=COLUMN endpoint=COLUMN [control=NAME] [out=FOLDER]
python -m src.report mlflow=EXPERIMENT arm=PARAM seed=PARAM endpoint=METRIC [control=NAME]

  endpoint=NAME        what is compared: numbers, or yes and no (1 and 0) for runs that failed or
                       not; a run without a finite number has failed
  control=NAME         the untreated arm; default: one called none, baseline or control
  tracking.uri=ADDRESS the MLflow server or database
"""


def _report(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.study.before_reporting import check_report

        check_report(fields)
        from src.study.report.make_report import report_command

    return report_command(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("report", _report, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
