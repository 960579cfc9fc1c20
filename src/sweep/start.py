"""The command src.train: checks names at once, and imports the rest when it knows what to run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.cli import command_line, interrupt
from src.common import terminal

if TYPE_CHECKING:
    from src.config.run_config import RunConfig
    from src.config.variant_name import Variant


def train(arguments: Sequence[str] | None = None, *, usage: str = "") -> int:
    """Trains one run or a sweep, or shows what it would be; returns the exit code."""
    named: list[Path] = []
    return command_line.main(
        "train",
        lambda config: _run(config, is_named=bool(named)),
        usage=usage,
        sweep=_sweep,
        plan=_show_plan,
        before_torch=lambda run: named.extend(_name_early(run)),
        argv=arguments,
    )


def _name_early(arguments: Sequence[str]) -> list[Path]:
    """Says what is about to be checked and trained, if PyTorch has yet to be imported.

    That takes seconds, in which a reader of the terminal would see nothing.

    Returns:
        The run folder, or nothing if nothing was said.
    """
    if "torch" in sys.modules:
        return []
    from src.cli.hydra_errors import readable
    from src.config.name_before_torch import name_before_torch

    with readable("train", arguments):
        name = name_before_torch("train", arguments)
    if name is None:
        return []
    what = _what(name.variant, name.target)
    terminal.say(f"loading PyTorch for {what}: {name.max_steps:,} steps, in {name.folder}")
    return [name.folder]


def _run(config: "RunConfig", *, is_named: bool) -> int:
    with interrupt.importing():
        from src.run.before_start import ready_to_start

    # A run that is announced also starts.
    corpus = ready_to_start(config)
    terminal.say(f"device: {_device(config)}" if is_named else _first_line(config))
    with interrupt.importing():
        from src.run.lifecycle import run

    return run(config, corpus=corpus)


def _first_line(config: "RunConfig") -> str:
    """What a run is, its device and its folder."""
    what = _what(config.variant, getattr(config.model, "target", None))
    return f"{what}: {config.recipe.max_steps:,} steps on {_device(config)}, in {config.folder}"


def _what(variant: "Variant", target: str | None) -> str:
    """The model and the remedies; `target` is that of an external model, otherwise None."""
    if target is not None:
        return f"{target}, {variant.stability}"
    return f"{variant.attention} + {variant.ffn}, {variant.stability}, model {variant.model}"


def _device(config: "RunConfig") -> str:
    if config.trainer.devices > 1:
        return f"{config.trainer.devices} devices ({config.trainer.device_type})"
    return {"cpu": "the CPU", "cuda": "a GPU"}[config.trainer.device_type]


def _show_plan(config: "RunConfig") -> int:
    with interrupt.importing():
        from src.sweep.preview import show_run

    return show_run(config)


def _sweep(config_name: str, arguments: Sequence[str]) -> int:
    with interrupt.importing():
        from src.sweep.expand import check_sweep

        check_sweep(config_name, arguments)
        from src.sweep.runner import sweep

    return sweep(config_name, arguments)
