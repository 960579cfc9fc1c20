"""`python -m src.diagnose`: a post-mortem of a state that somebody has."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.diagnose checkpoint=PATH [batch=FILE] [target=MODULE:CALLABLE] [field=value ...]

Runs one step of a saved state under watch, forward and backward, and names the first operation
whose result is not finite; where all is finite, the quantities that come nearest to their limits.

  checkpoint=runs/.../seed-0                    a run, an incident's folder, or a checkpoint of ours
  checkpoint=last.ckpt target=pkg.model:build   weights of yours, and what builds the nn.Module
  batch=batch.npy                               token ids (rows, time); a text; or what your
                                                training_step takes, as .pt
  kwargs={depth:4}  precision=32-true|bf16-mixed|16-mixed|64-true|bf16-true|16-true
  top=10  format=text|json

No code is run out of the checkpoint. Code of yours is run where you name it.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.postmortem.diagnosis import diagnose

        return command_line.plain_main("diagnose", diagnose, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
