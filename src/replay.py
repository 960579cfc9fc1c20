"""`python -m src.replay`: runs a recorded step again."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.replay incident=FOLDER [+with.field=value ...] [format=text|json]

Runs the step of an incident again, in this process, from what was saved, and says which operation
fails; with other values, whether they would have averted it:

  +with.ffn.router.norm_eps=1e-20   +with.ffn.router.bias_use=select   +with.recipe.z_loss_weight=0

FOLDER is runs/<study>/<variant>/seed-<n>/incidents/step-<n>.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.cli.field_checks import given_path
        from src.postmortem.replay_step import replay

        return command_line.plain_main(
            "replay",
            lambda given: replay(given_path(given, "incident"), given["with"], given["format"]),
            usage=USAGE,
            argv=argv,
        )


if __name__ == "__main__":
    sys.exit(main())
