"""The callbacks of a run, in the order in which they must act."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nonfinite.lightning import (
    ActivationWatch,
    EarlyWarning,
    GradientWatch,
    IncidentRecorder,
    RouterWatch,
    SpikeWatch,
)
from nonfinite.lightning.guard import StepGuard
from src.common import terminal
from src.common.run_folder import RunFolder
from src.config.fork import Fork
from src.config.run_config import RunConfig
from src.data import Corpus, ValBatches
from src.external.model import ExternalConfig
from src.run.metrics_writer import MetricsWriter
from src.run.start_fork import state_key
from src.stability import RunFacts
from src.training.checkpoint_writer import Checkpoints
from src.training.metrics import TrainMetrics
from src.training.progress import ProgressBar
from src.training.stop_on_signal import Interrupt
from src.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks that are asked for results later, and all callbacks in order."""

    guard: StepGuard
    metrics: TrainMetrics
    spikes: SpikeWatch
    validation: Validation
    interrupt: Interrupt
    incidents: IncidentRecorder | None
    early: EarlyWarning
    in_order: list[pl.Callback]


def build_callbacks(
    config: RunConfig,
    *,
    corpus: Corpus,
    folder: RunFolder,
    writer: MetricsWriter | None,
    checkpoint_extras: Mapping[str, Any],
) -> Callbacks:
    """Creates all callbacks of a run.

    Args:
        config: the run's configuration.
        corpus: the text, for validation.
        folder: the run folder.
        writer: writes the metrics in the first process; None in the others, which write no metrics.
        checkpoint_extras: plain values to store in every checkpoint.
    """
    recipe, watch = config.recipe, config.watch
    guard = StepGuard(config.guard, max_steps=recipe.max_steps, log_every=recipe.log_every)
    metrics = TrainMetrics(
        tokens_per_step=recipe.tokens_per_step,
        max_steps=recipe.max_steps,
        log_every=recipe.log_every,
    )
    spikes = SpikeWatch(guard, every=recipe.log_every)
    validation = _validation(config, corpus)
    interrupt = Interrupt()
    incidents = None
    if watch.incidents:
        incidents = IncidentRecorder(
            folder.path / "incidents",
            say=terminal.warn,
            extras=checkpoint_extras,
            repeat=repeat_command(config),
        )
    checkpoints = _checkpoints(config, folder, validation, writer, checkpoint_extras)
    early = EarlyWarning(
        say=terminal.warn,
        save=lambda step: checkpoints.keep.update({step: _state_file(folder, step)}),
        float_max=watch.float_max,
    )
    in_order: list[pl.Callback | None] = [
        # The guard comes first, because it must measure the gradient before a remedy changes it.
        guard,
        GradientWatch(every=watch.gradients_every) if watch.gradients_every else None,
        *_remedies(config),
        # These instruments measure the gradient after the remedies have changed it.
        metrics,
        spikes,
        RouterWatch(every=watch.routers_every) if watch.routers_every else None,
        ActivationWatch(every=watch.activations_every, apart=config.compile)
        if watch.activations_every
        else None,
        early,
        incidents,
        validation,
        interrupt,
        None
        if writer is None
        else ProgressBar(latest=writer.latest, guard=guard, max_steps=recipe.max_steps),
        # Checkpoints come last, because they save the state of all other callbacks.
        checkpoints,
    ]
    return Callbacks(
        guard=guard,
        metrics=metrics,
        spikes=spikes,
        validation=validation,
        interrupt=interrupt,
        incidents=incidents,
        early=early,
        in_order=[callback for callback in in_order if callback is not None],
    )


def _remedies(config: RunConfig) -> list[pl.Callback]:
    """The callbacks of the run's remedies, then those of its observers."""
    recipe = config.recipe
    run = RunFacts(
        max_steps=recipe.max_steps,
        log_every=recipe.log_every,
        seed=config.seed,
        repeat=config.repeat,
        clip_norm=recipe.clip_norm,
    )
    return [callback for remedy in config.all_remedies for callback in remedy.callbacks(run)]


def _validation(config: RunConfig, corpus: Corpus) -> Validation:
    recipe = config.recipe
    return Validation(
        ValBatches(
            corpus.val,
            batch_size=recipe.val_rows,
            seq_len=recipe.seq_len,
            max_windows=recipe.val_windows,
        ),
        at_steps=recipe.validation_steps(),
        # Saved weights are also validated before the first step, as a point of comparison.
        for_others={*config.validate_at, *([0] if config.init is not None else [])},
        token_bytes=corpus.tokenizer.token_bytes(),
    )


def _checkpoints(
    config: RunConfig,
    folder: RunFolder,
    validation: Validation,
    writer: MetricsWriter | None,
    extras: Mapping[str, Any],
) -> Checkpoints:
    return Checkpoints(
        folder.last,
        validation=validation,
        every=config.recipe.checkpoint_every,
        keep={step: _state_file(folder, step) for step in config.save_at},
        keys=lambda step: state_key(
            extras["config_hash"], extras["observed"], step, origins=extras["origins"]
        ),
        flush=(lambda: 0) if writer is None else writer.flush,
    )


def _state_file(folder: RunFolder, step: int) -> Path:
    return Fork(source=folder.path, step=step).state


def repeat_command(config: RunConfig) -> str:
    """The command that reruns an incident, with `{folder}` for the incident's folder."""
    if isinstance(config.model, ExternalConfig):
        return f"python -m src.diagnose checkpoint={{folder}} target={config.model.target}"
    return "python -m src.replay incident={folder}"
