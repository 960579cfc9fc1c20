"""`python -m src.replay`: runs a recorded step again."""

import sys

from src import startup

USAGE = """
python -m src.replay incident=FOLDER [+with.field=value ...] [format=text|json]

Runs the step of an incident again, in this process, from what was saved, and says which operation
fails; with other values, whether they would have averted it:

  +with.ffn.router.norm_eps=1e-20   +with.ffn.router.bias_use=select   +with.recipe.z_loss_weight=0

FOLDER is runs/<study>/<variant>/seed-<n>/incidents/step-<n>.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with startup.quiet_interrupt():
        from src import cli
        from src.given import given_path
        from src.run.replay import replay

        return cli.plain_main(
            "replay",
            lambda given: replay(given_path(given, "incident"), given["with"], given["format"]),
            usage=USAGE,
            argv=argv,
        )


if __name__ == "__main__":
    sys.exit(main())
