"""`python -m src.describe`: sizes and costs of a configuration, without building the model."""

import sys
from typing import TYPE_CHECKING

from src.cli import interrupt

if TYPE_CHECKING:
    from src.config.run_config import RunConfig

USAGE = """
python -m src.describe [field=value ...]

Shows sizes and costs of a configuration without training: parameters, KV cache, FLOPs, checkpoint
size and the peak memory of a run.

  attention=gqa|mlha  ffn=mlp|moe  model=proxy|small|stress|smollm2_135m|smoldeepseek_916m
  tokens_per_second=20000          speed measured on the machine of the run: adds the run's hours
  format=text|json                 a table, or one JSON object

All fields of src.train can be typed as well.
"""


def _describe(config: "RunConfig") -> int:
    with interrupt.importing():
        from src.run.describe_run import describe

    return describe(config)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.main("describe", _describe, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
