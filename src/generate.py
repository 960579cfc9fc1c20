"""`python -m src.generate`: generates text with a trained model."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.generate run=FOLDER_OR_CHECKPOINT [prompt=TEXT] [field=value ...]

Continues prompts with a trained model. Without a prompt it uses the five prompts of the write-up.

  prompt="Once upon a time"      any text
  prompts_file=FILE              one prompt per line; - reads standard input
  max_new_tokens=200             number of tokens to generate for each prompt
  temperature=0.8                0: always the most likely token
  top_k=40  top_p=0.95  repetition_penalty=1.2
  seed=0  weights=raw|ema  format=text|json
"""


def _generate(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.generation.generate_text import generate

    return generate(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        return command_line.plain_main(
            "generate", _generate, usage=USAGE, verbatim=["prompt"], argv=argv
        )


if __name__ == "__main__":
    sys.exit(main())
