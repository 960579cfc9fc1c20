"""`python -m src.audit`: what could go non-finite in a model, before it does."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.audit target=MODULE:CALLABLE [checkpoint=PATH] [batch=FILE] [field=value ...]

Lists the operations of a model that can divide by zero, overflow or leave their domain. Each is
proved safe, or reached by an input or by weights that are saved (a witness), or unknown. Nothing is
trained.

  target=pkg.model:build            the callable that builds your nn.Module
  kwargs={depth:4}                  its arguments
  checkpoint=runs/.../seed-0        weights; a run folder needs no target
  batch=batch.pt                    what the model is called with; token ids as .npy or .pt
  dtype=[float32,bfloat16,float16]  precisions; all three unless given
  weights=8  inputs=8               how far weights and inputs may go
  seconds=60                        when the search ends
  allow=[router.py:61]              accepted: texts that occur in the line of a finding
  witness=audit/witness-1-float32.pt  run a saved witness again
  format=text|json

Exit code 1 if a witness is found that is not accepted, or if one that is run again still fails.
"""


def _audit(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.postmortem.given import check_audit

        check_audit(fields)
        from src.postmortem.audit_target import audit_target

    return audit_target(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("audit", _audit, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
