"""`python -m src.bench`: how fast a training step is, beside the floor and beside others."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.bench [field=value ...]

Trains the same steps with this project, with transformers where it is installed, and with nothing
but the step's products, attention and AdamW (the floor), in processes that take turns: whatever
else the machine does falls on all alike. Compare within a table, not from one to the next.

  tasks=[step,loop,decode,start,growth]
  shapes=[proxy,mid,smollm2_135m,smoldeepseek_916m]  cells=[gqa+mlp,mlha+moe]
  contestants=[ours,"ours compiled",transformers,"transformers compiled",floor]
  precision=32-true|bf16-mixed  device=auto|cpu|cuda  threads=1  batch_size=null
  rounds=7  steps=5  warmup=3  out=results.jsonl  format=text|json
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.lab.benchmark.run_benchmark import bench

        return command_line.plain_main("bench", bench, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
