"""`python -m src.train`: trains one composition, or with --multirun several."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.train [field=value ...]              one run
python -m src.train --multirun field=a,b,c ...     a run for each value

  attention=gqa|mlha     ffn=mlp|moe|moe_writeup|moe_writeup_add
  stability=none|clip03|early_stop|warmdown|fp32|noise|ema|... or several: stability=[clip03,ema]
  model=proxy|small|stress|smollm2_135m|smoldeepseek_916m
  model=external model.target=package.module:callable 'model.kwargs={name:value}'
  preset=laptop|smoke|stress|stress_bf16|crash|control|hot|long|writeup|writeup_constant
  data=shakespeare|text|tokens|tiny_shakespeare
  tokenizer=char|byte|bpe|smollm2|checkpoint
  init=FOLDER            begins with the weights, sizes and tokenizer of a saved or converted model
  seed=0  study=name  resume=auto|never|CHECKPOINT  rerun=true  tracking=mlflow|local
  recipe.max_steps=440  recipe.learning_rate=3e-3  recipe.precision=32-true|bf16-mixed  ...

Sweeps: experiment=stability|precision|... n_jobs=2 timeout=SECONDS plan=true share_prefix=false
        hydra/launcher=slurm hydra.launcher.partition=...   (src/sweep/CLUSTER.md)
One run on several devices: trainer=ddp trainer.devices=8
Counterfactuals: fork=RUN_FOLDER@STEP from a state that save_at=[STEP,...] has kept

All fields with their meaning: conf/ and the dataclasses it names. Results: runs/, make ui.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    with interrupt.quiet_interrupt():
        # The imports take seconds, in which somebody may press Ctrl-C.
        from src.sweep.runner import train

        return train(argv, usage=USAGE)


if __name__ == "__main__":
    sys.exit(main())
