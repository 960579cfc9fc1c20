"""`python -m src.train`: trains one run, or with --multirun a sweep."""

import sys

from src.cli import interrupt

USAGE = """
python -m src.train [field=value ...]              train one run
python -m src.train --multirun field=a,b,c ...     train one run for each value

  attention=gqa|mlha     ffn=mlp|moe|moe_writeup|moe_writeup_add
  stability=none|clip03|early_stop|warmdown|fp32|noise|ema|... or several: stability=[clip03,ema]
  model=proxy|small|stress|smollm2_135m|smoldeepseek_916m
  model=external model.target=package.module:callable 'model.kwargs={name:value}'
  preset=laptop|smoke|stress|stress_bf16|crash|control|hot|long|writeup|writeup_constant
  data=shakespeare|text|tokens|tiny_shakespeare
  tokenizer=char|byte|bpe|smollm2|checkpoint
  init=FOLDER            start with the weights, sizes and tokenizer of a saved or converted model
  seed=0  study=name  resume=auto|never|CHECKPOINT  rerun=true  tracking=mlflow|local
  recipe.max_steps=440  recipe.learning_rate=3e-3  recipe.precision=32-true|bf16-mixed|bf16-true ...

Sweeps: experiment=stability|precision|... n_jobs=2 timeout=SECONDS share_prefix=false
        hydra/launcher=slurm hydra.launcher.partition=...   (docs/cluster.md)
One run on several devices: trainer=ddp trainer.devices=8
Shown, not run: plan=true (size and cost)  --cfg job (the configuration)  --info (all options)
Your own options: --config-dir FOLDER
Completion on Tab: eval "$(python -m src.train --shell-completion install=bash)"
Branches: fork=RUN_FOLDER@STEP starts from a state that the run saved with save_at=[STEP,...]

docs/configuration.md lists all fields. Results are in runs/; `make ui` shows them.
"""


def main(argv: list[str] | None = None) -> int:
    with interrupt.quiet_interrupt():
        from src.sweep.start import train

        return train(argv, usage=USAGE)


if __name__ == "__main__":
    sys.exit(main())
