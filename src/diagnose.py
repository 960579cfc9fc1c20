"""`python -m src.diagnose`: finds the first non-finite operation of a saved model."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.diagnose checkpoint=PATH [batch=FILE] [target=MODULE:CALLABLE] [field=value ...]

Traces one training step of a saved model, forward and backward, and names the first operation whose
result is not finite. If all results are finite, it lists the values closest to their limits.

  checkpoint=runs/.../seed-0                    a run folder, an incident folder, or a checkpoint of
                                                this project
  checkpoint=last.ckpt target=pkg.model:build   your own weights, and the callable that builds your
                                                nn.Module
  batch=batch.npy                               token ids of shape (rows, time); or a .pt file
                                                with the input of your training_step; or, for a
                                                checkpoint of this project, a text file
  kwargs={depth:4}                              arguments of target
  precision=32-true|bf16-mixed|16-mixed|64-true|bf16-true|16-true
  top=10                                        number of values to list
  format=text|json

Loading a checkpoint never executes code from it. The only foreign code that runs is the target.
"""


def _diagnose(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.postmortem.given import check_diagnose

        check_diagnose(fields)
        from src.postmortem.diagnosis import diagnose

    return diagnose(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("diagnose", _diagnose, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
