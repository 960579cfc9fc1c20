"""`python -m src.lab COMMAND`: detect, survey, bench, power, remedies, book, reproduce, docs."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from src.cli import interrupt

DETECT = """
python -m src.lab detect [field=value ...]

Trains healthy and failing runs, seconds each, in which one known thing goes wrong, and says how
many of the failures were warned of, how long before, how many warnings were false, and how often
the first operation and the cause were named rightly. Misses are listed. Then runs failures that
people reported in public under four tools, and says what each of them noticed and named.

  seeds=[1000,1001]   the half on which the thresholds of early warning are set
  unseen=[2000,2001]  the half that is reported
  only=planted|public       one part alone; the public failures take half a minute
  n_jobs=2  study=detector  out=FOLDER

About 15 minutes on two cores. Runs that are finished are not trained again: with other thresholds
their values are judged again; after another change, choose another study.
"""

SURVEY = """
python -m src.lab survey [field=value ...]

Audits every family of causal language models of the installed transformers that can be built small,
and public fixes of NaN bugs, before and after, and writes what is found.

  only=families|pairs    one part alone; the pairs take a minute
  families=[llama,mixtral]   these families alone
  seconds=60             the search in one model ends after this time
  out=FOLDER             where results.csv, findings.csv and pairs.csv go

About 15 minutes on one core.
"""

BENCH = """
python -m src.lab bench [field=value ...]

Trains the same steps with this project, with transformers where it is installed, and with nothing
but the step's products, attention and AdamW (the floor), in processes that take turns: whatever
else the machine does falls on all alike. Compare within a table, not from one to the next.

  tasks=[step,loop,decode,start,growth]
  shapes=[proxy,mid,smollm2_135m,smoldeepseek_916m]  cells=[gqa+mlp,mlha+moe]
  contestants=[ours,"ours compiled",transformers,"transformers compiled",floor]
  precision=32-true|bf16-mixed  device=auto|cpu|cuda  threads=1  batch_size=null
  rounds=7  steps=5  warmup=3  out=results.jsonl  format=text|json
"""

POWER = """
python -m src.lab power [field=value ...]

Simulates studies of ten arms and analyses them by the code that analyses others. Prints how often
an arm without an effect is called significant, how often one that prevents 38, 50 or 75 % of the
failures is found, and what that costs: with a fixed number of seeds, and with sequential=true.

  studies=2000    studies without any effect, of each design
  n_jobs=2        processes in parallel
  out=FOLDER      where to write power.csv

About half an hour on two cores with 2,000 studies.
"""

BOOK = """
python -m src.lab book [studies=NAME | studies=[NAME,NAME]] [paths.runs=FOLDER]

Writes results.csv, arms.csv and plots of the studies named, from their runs, into experiments/, and
makes every page again that has a template beside it (README.md.jinja), with the numbers that the
results give. Without studies it makes the pages alone.
"""

REPRODUCE = """
python -m src.lab reproduce [studies=NAME | studies=[NAME,NAME]] [n_jobs=2] [plan=true]

Runs the studies of experiments/ again, all of them unless named, says beforehand what that takes
(hours), and compares every run with the committed results.csv: bit by bit, and where the last bits
differ, as on another machine, by statistics. Ctrl-C stops it; the same command goes on.

  studies=[stability,root_cause]   folders of experiments/ that have a study.yaml
  plan=true                        say what would be run, and stop
  n_jobs=2                         runs at a time
  paths.runs=FOLDER                where the runs go; runs unless given
"""

REMEDIES = """
python -m src.lab remedies [field=value ...]

Shows how much of each failure's damage each remedy undoes, from the committed results of
experiments/remedies. With add= it trains what is missing for a remedy or a failure of your own.

  failure=attention_logits   all that is known of one failure, the most helpful remedy first
  add=NAME                   a registered remedy: its row, beside the others
  add=FILE.yaml              a failure, written as those in experiments/remedies/failures
  plan=true                  with add=: say what would be run, and stop
  n_jobs=2  paths.runs=FOLDER
"""

DOCS = """
python -m src.lab docs [out=FILE]

Writes docs/configuration.md, the reference of all fields, from the dataclasses under src/ and the
files in conf/. Needed after a change in one of these; a test says so.
"""

USAGE = """
python -m src.lab COMMAND [field=value ...]

  detect      how often early warnings and named causes are right, on known failures
  survey      what audits find in small models of transformers, and in public fixes
  bench       how fast a training step is, beside the floor and beside transformers
  power       how often the analysis of a study is wrong, what it sees, and what that costs
  remedies    which remedy undoes how much of which failure, and one more of your own
  book        the pages of experiments/, made from results
  reproduce   the studies of experiments/, run again and compared
  docs        docs/configuration.md, made from the configuration

python -m src.lab <command> --help says more.
"""

COMMANDS = {
    "detect": ("src.lab.detector.run_detector", "detect", DETECT),
    "survey": ("src.lab.audit.run_survey", "survey", SURVEY),
    "bench": ("src.lab.benchmark.run_benchmark", "bench", BENCH),
    "power": ("src.lab.simulation.power_tables", "power_command", POWER),
    "remedies": ("src.lab.remedies.remedies_command", "remedies", REMEDIES),
    "book": ("src.lab.book.run_studies", "write_book", BOOK),
    "reproduce": ("src.lab.book.run_studies", "reproduce", REPRODUCE),
    "docs": ("src.lab.docs.write_docs", "write_docs", DOCS),
}
"""Module, function and help of each; its fields are in conf/<command>.yaml."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (words[0], words[1:]) if words else ("--help", [])
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.common import terminal
        from src.common.errors import nearest

        if name in ("--help", "-h"):
            terminal.say(USAGE.strip())
            return command_line.OK
        if name not in COMMANDS:
            hint = nearest(name, COMMANDS)
            terminal.error(f"{name}: unknown command; {hint}allowed: {', '.join(COMMANDS)}")
            return command_line.BAD_INPUT
        module, function, usage = COMMANDS[name]

        def act(fields: dict[str, Any]) -> int:
            with interrupt.importing():
                command = getattr(importlib.import_module(module), function)
            code: int = command(fields)
            return code

        return command_line.plain_main(name, act, usage=usage, argv=arguments)


if __name__ == "__main__":
    sys.exit(main())
