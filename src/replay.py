"""`python -m src.replay`: reruns the recorded step of an incident."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.replay incident=FOLDER [+with.field=value ...] [format=text|json]

Reruns the step of an incident from its saved state and names the operation that fails. With changed
values it tells whether these would have prevented the failure:

  +with.ffn.router.norm_eps=1e-20   +with.ffn.router.bias_use=select   +with.recipe.z_loss_weight=0

FOLDER is runs/<study>/<variant>/seed-<n>/incidents/step-<n>.
"""


def _replay(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.postmortem.given import check_replay

        incident = check_replay(fields)
        from src.postmortem.replay_step import replay

    return replay(incident, fields["with"], fields["format"])


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main("replay", _replay, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
