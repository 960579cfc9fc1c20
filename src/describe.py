"""`python -m src.describe`: sizes and costs of any composition, never built as a whole."""

import json
import math
import sys
from pathlib import Path

from src import cli, terminal
from src.config import RunConfig
from src.errors import InputError
from src.memory import Memory, predict_memory
from src.model.size import Size

USAGE = """
python -m src.describe [field=value ...]

Sizes and costs of a composition: parameters, KV cache, FLOPs, checkpoint, the memory of a run at
its recipe. Trains nothing.

  attention=gqa|mlha  ffn=mlp|moe  model=proxy|small|stress|smollm2_135m|smoldeepseek_916m
  tokens_per_second=20000          measured where the run will be: adds the hours that it takes
  format=text|json                 a table, or one JSON object

Every field of src.train can be given as well.
"""

FORMATS = ("text", "json")


def describe(config: RunConfig) -> int:
    """Prints the sizes."""
    if config.extra["format"] not in FORMATS:
        raise InputError(f"format={config.extra['format']}: must be one of {', '.join(FORMATS)}")
    speed = config.extra["tokens_per_second"]
    hours = None if speed is None else run_hours(config, tokens_per_second=speed)
    size = config.architecture.measure(
        vocab_size=vocab_size(config), averaged_weights="ema" in config.remedies
    )
    memory = predict_memory(config, vocab_size=size.vocab_size)
    if config.extra["format"] == "json":
        plain = None if memory is None else memory.plain()
        print(json.dumps({**size.plain(), "memory": plain, "hours": hours}))
    else:
        _show(config, size, memory, hours)
    return cli.OK


def run_hours(config: RunConfig, *, tokens_per_second: float) -> float:
    """Hours of a run's training steps at a known speed.

    Raises:
        InputError: there is no such speed.
    """
    if not 0 < tokens_per_second < math.inf:
        raise InputError(f"tokens_per_second={tokens_per_second}: must be above 0 and finite")
    return config.last_step * config.recipe.tokens_per_step / tokens_per_second / 3600


def vocab_size(config: RunConfig) -> int:
    """Rows of the embedding; the tokenizer is asked only where the model leaves them open."""
    fixed = config.architecture.vocab_size
    if fixed is not None:
        return fixed
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    return corpus.tokenizer.vocab_size


def _show(config: RunConfig, size: Size, memory: Memory | None, hours: float | None) -> None:
    variant = config.variant
    title = f"{variant.attention} + {variant.ffn}, model {variant.model}"
    cache = size.cache_bytes_per_token
    rows = [["vocabulary", f"{size.vocab_size:,}"]]
    rows += [["parameters, total", f"{size.params_total:,}"]]
    rows += [["parameters, active for a token", f"{size.params_active:,}"]]
    rows += [[f"  {part}", f"{count:,}"] for part, count in size.params_by_part.items()]
    rows += [
        ["KV cache, bytes a token (float32)", "unknown" if cache is None else f"{cache:,}"],
        ["decoding attends to", size.decoding],
        ["FLOPs a token, training", f"{size.flops_per_token:,}"],
        ["FLOPs a token, forward", f"{size.forward_flops_per_token:,}"],
        ["checkpoint, bytes", f"{size.checkpoint_bytes:,}"],
    ]
    recipe = config.recipe
    if hours is not None:
        steps = f"hours of {config.last_step:,} steps of {recipe.tokens_per_step:,} tokens"
        rows += [[steps, f"{hours:,.2f}"]]
    if memory is None:
        rows += [["memory of a run", "unknown: compiled, not our model, or too large to try here"]]
    else:
        rows += [[f"memory of a run in {recipe.precision}, bytes", f"{memory.peak:,}"]]
        parts = {part: count for part, count in memory.plain().items() if part != "peak"}
        rows += [[f"  {part}", f"{count:,}"] for part, count in parts.items()]
    terminal.table(title, ["", "value"], rows)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.main("describe", describe, usage=USAGE, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
