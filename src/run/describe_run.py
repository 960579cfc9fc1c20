"""Sizes and costs of a configuration, without building the model."""

import dataclasses
import json

from src.common import terminal
from src.common.errors import InputError
from src.config.memory_estimate import Memory, predict_memory, run_hours, vocab_size
from src.config.run_config import RunConfig
from src.model.size import Size

FORMATS = ("text", "json")


def describe(config: RunConfig) -> int:
    """Prints sizes and costs; returns the exit code."""
    if config.extra["format"] not in FORMATS:
        raise InputError(f"format={config.extra['format']}: must be one of {', '.join(FORMATS)}")
    speed = config.extra["tokens_per_second"]
    hours = None if speed is None else run_hours(config, tokens_per_second=speed)
    size = config.architecture.measure(
        vocab_size=vocab_size(config),
        averaged_weights=any(r.keeps_average for r in config.remedies.values()),
    )
    memory = predict_memory(config, vocab_size=size.vocab_size)
    if config.extra["format"] == "json":
        plain = None if memory is None else memory.plain()
        print(json.dumps({**dataclasses.asdict(size), "memory": plain, "hours": hours}))
    else:
        _show(config, size, memory, hours)
    return 0


def _show(config: RunConfig, size: Size, memory: Memory | None, hours: float | None) -> None:
    variant = config.variant
    title = f"{variant.attention} + {variant.ffn}, model {variant.model}"
    cache = size.cache_bytes_per_token
    rows = [["vocabulary", f"{size.vocab_size:,}"]]
    rows += [["parameters, total", f"{size.params_total:,}"]]
    rows += [["parameters, active per token", f"{size.params_active:,}"]]
    rows += [[f"  {part}", f"{count:,}"] for part, count in size.params_by_part.items()]
    rows += [
        ["KV cache, bytes per token (float32)", "unknown" if cache is None else f"{cache:,}"],
        ["decoding attends to", size.decoding],
        ["FLOPs per token, training", f"{size.flops_per_token:,}"],
        ["FLOPs per token, forward", f"{size.forward_flops_per_token:,}"],
        ["checkpoint, bytes", f"{size.checkpoint_bytes:,}"],
    ]
    recipe = config.recipe
    if hours is not None:
        label = f"hours for {config.last_step:,} steps of {recipe.tokens_per_step:,} tokens"
        rows += [[label, f"{hours:,.2f}"]]
    if memory is None:
        reason = "compiled, an external model, or too large to try here"
        rows += [["peak memory of a run", f"unknown: {reason}"]]
    else:
        rows += [[f"peak memory of a run in {recipe.precision}, bytes", f"{memory.peak:,}"]]
        parts = {part: count for part, count in memory.plain().items() if part != "peak"}
        rows += [[f"  {part}", f"{count:,}"] for part, count in parts.items()]
    terminal.table(title, ["", "value"], rows)
