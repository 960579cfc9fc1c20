"""The command src.train: checks names at once, and imports the rest when it knows what to run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from src.cli import command_line, interrupt
from src.common import terminal

if TYPE_CHECKING:
    from src.config.run_config import RunConfig


def train(arguments: Sequence[str] | None = None, *, usage: str = "") -> int:
    """Trains one run or a sweep, or shows what it would be; returns the exit code."""
    return command_line.main(
        "train", _run, usage=usage, sweep=_sweep, plan=_show_plan, argv=arguments
    )


def _run(config: "RunConfig") -> int:
    with interrupt.importing():
        from src.run.before_start import ready_to_start

    # A run that is announced also starts.
    corpus = ready_to_start(config)
    terminal.say(_first_line(config))
    with interrupt.importing():
        from src.run.lifecycle import run

    return run(config, corpus=corpus)


def _first_line(config: "RunConfig") -> str:
    """What a run is, its device and its folder."""
    variant, recipe = config.variant, config.recipe
    what = f"{variant.attention} + {variant.ffn}, {variant.stability}, model {variant.model}"
    if variant.attention == variant.model:
        what = f"{config.model.target}, {variant.stability}"  # type: ignore[union-attr]
    device = {"cpu": "the CPU", "cuda": "a GPU"}[config.trainer.device_type]
    if config.trainer.devices > 1:
        device = f"{config.trainer.devices} devices ({config.trainer.device_type})"
    return f"{what}: {recipe.max_steps:,} steps on {device}, in {config.folder}"


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
