"""Builds everything that a run is made of, from its configuration."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from nonfinite import (
    ActivationWatch,
    EarlyWarning,
    GradientWatch,
    IncidentRecorder,
    RouterWatch,
    SpikeWatch,
)
from nonfinite.guard import StepGuard
from src.checkpoint.init_from import load_initial
from src.common import terminal
from src.common.errors import InputError
from src.common.random_streams import generator, seed_global, stream_seed
from src.common.run_folder import RunFolder
from src.config.fork import Fork
from src.config.memory_estimate import check_memory
from src.config.run_config import RunConfig
from src.data import Corpus, TrainBatches, ValBatches
from src.external.model import ExternalConfig
from src.model import Transformer
from src.run.ddp import Place, Ranks
from src.run.metrics_writer import MetricsWriter
from src.run.process_setup import set_up_memory
from src.run.start_fork import state_key
from src.stability import RunFacts
from src.training.checkpoint_writer import Checkpoints, StraightToFile
from src.training.metrics import TrainMetrics
from src.training.progress import ProgressBar
from src.training.signals import Interrupt
from src.training.task import LanguageModelTask
from src.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run that are asked about it later."""

    task: LanguageModelTask
    trainer: pl.Trainer
    batches: TrainBatches
    guard: StepGuard
    metrics: TrainMetrics
    spikes: SpikeWatch
    validation: Validation
    interrupt: Interrupt
    incidents: IncidentRecorder | None
    early: EarlyWarning


def vocab_size_for(config: RunConfig, corpus: Corpus) -> int:
    """Tokens that the model must know.

    Raises:
        InputError: the tokenizer has more than the model is fixed to.
    """
    num_tokens = corpus.tokenizer.vocab_size
    vocab_size = config.architecture.vocab_size or num_tokens
    if num_tokens > vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size}: must be at least the tokenizer's {num_tokens} tokens"
        )
    return vocab_size


def model_for(config: RunConfig, corpus: Corpus) -> nn.Module:
    """The initialised model.

    Raises:
        InputError: the tokenizer has more tokens than the model, or the model is none.
    """
    check_memory(config, vocab_size=vocab_size_for(config, corpus))
    model = config.architecture.build(
        vocab_size=vocab_size_for(config, corpus),
        generator_for=lambda name: generator(config.seed, "init", name),
    )
    if config.init is not None:
        load_initial(model, config.init)
    if isinstance(model, Transformer):
        model.checkpoint_blocks = config.trainer.activation_checkpointing
    return model


def assemble(
    config: RunConfig,
    *,
    model: nn.Module,
    corpus: Corpus,
    folder: RunFolder,
    writer: MetricsWriter | None,
    place: Place,
    checkpoint_extras: Mapping[str, Any],
) -> Assembly:
    """Callbacks in the order in which they must act, the task and the trainer.

    Args:
        config: of the run.
        model: to be trained.
        corpus: its text.
        folder: the run folder.
        writer: of the metrics, in the first process; None in the others, which write nothing.
        place: of this process.
        checkpoint_extras: plain values that every checkpoint carries.
    """
    recipe = config.recipe
    run = RunFacts(
        max_steps=recipe.max_steps,
        log_every=recipe.log_every,
        seed=config.seed,
        repeat=config.repeat,
        clip_norm=recipe.clip_norm,
    )
    guard = StepGuard(config.guard, max_steps=recipe.max_steps, log_every=recipe.log_every)
    metrics = TrainMetrics(
        tokens_per_step=recipe.tokens_per_step,
        max_steps=recipe.max_steps,
        log_every=recipe.log_every,
    )
    spikes = SpikeWatch(guard, every=recipe.log_every)
    validation = Validation(
        ValBatches(
            corpus.val,
            batch_size=recipe.val_rows,
            seq_len=recipe.seq_len,
            max_windows=recipe.val_windows,
        ),
        at_steps=recipe.validation_steps(),
        # What a saved model is worth is known before it is trained on.
        for_others={*config.validate_at, *([0] if config.init is not None else [])},
        token_bytes=corpus.tokenizer.token_bytes(),
    )
    interrupt = Interrupt()
    incidents = None
    if config.watch.incidents:
        incidents = IncidentRecorder(
            folder.path / "incidents",
            say=terminal.warn,
            extras=checkpoint_extras,
            repeat=repeat_command(config),
        )

    def kept(step: int) -> Path:
        return Fork(source=folder.path, step=step).state

    checkpoints = Checkpoints(
        folder.last,
        validation=validation,
        every=recipe.checkpoint_every,
        keep={step: kept(step) for step in config.save_at},
        keys=lambda step: state_key(
            checkpoint_extras["config_hash"],
            checkpoint_extras["observed"],
            step,
            origins=checkpoint_extras["origins"],
        ),
        flush=_nothing if writer is None else writer.flush,
    )
    watch = config.watch
    early = EarlyWarning(
        say=terminal.warn,
        save=lambda step: checkpoints.keep.update({step: kept(step)}),
        float_max=watch.float_max,
    )
    callbacks: list[pl.Callback | None] = [
        # First the guard, which measures the gradient before a remedy touches it; then remedies,
        # then instruments; what saves the state of all others comes last.
        guard,
        GradientWatch(every=watch.gradients_every) if watch.gradients_every else None,
        *(c for remedy in config.remedies.values() for c in remedy.callbacks(run)),
        *(c for remedy in config.observers.values() for c in remedy.callbacks(run)),
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
        checkpoints,
    ]
    trainer = pl.Trainer(
        accelerator="gpu" if config.trainer.device_type == "cuda" else "cpu",
        devices=config.trainer.devices,
        strategy=_shared(model) if place.world_size > 1 else "auto",
        plugins=[Ranks(place), StraightToFile()],
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=recipe.max_steps,
        accumulate_grad_batches=recipe.accumulate,
        callbacks=[callback for callback in callbacks if callback is not None],
        logger=writer or False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder.path,
    )
    task = LanguageModelTask(
        model=model,
        recipe=recipe,
        guard=guard,
        lr_factor=config.lr_factor,
        checkpoint_extras=dict(checkpoint_extras),
        compiled=config.compile,
    )
    batches = TrainBatches(
        corpus.train,
        seed=config.seed,
        batch_size=recipe.batch_size,
        seq_len=recipe.seq_len,
        first=lambda: trainer.global_step * recipe.accumulate,
        rank=place.rank,
        world_size=place.world_size,
    )
    return Assembly(
        task=task,
        trainer=trainer,
        batches=batches,
        guard=guard,
        metrics=metrics,
        spikes=spikes,
        validation=validation,
        interrupt=interrupt,
        incidents=incidents,
        early=early,
    )


def repeat_command(config: RunConfig) -> str:
    """The command that runs an incident again."""
    if isinstance(config.model, ExternalConfig):
        return f"python -m src.diagnose checkpoint={{folder}} target={config.model.target}"
    return "python -m src.replay incident={folder}"


def _shared(model: nn.Module) -> DDPStrategy:
    """Several processes, each with all weights."""
    # A trainable bias has no gradient while it is frozen, nor where it picks experts only; of a
    # model that is not ours nobody knows. To look for such weights walks the graph every step.
    lacking = not isinstance(model, Transformer) or any(
        isinstance(router.bias_E, nn.Parameter) for router in model.routers()
    )
    # Buffers are a process's own, such as a router's counts until they are summed.
    return DDPStrategy(broadcast_buffers=False, find_unused_parameters=lacking)


def _nothing() -> int:
    """What is flushed where nothing is written."""
    return 0


def set_numerics(config: RunConfig, *, rank: int = 0) -> None:
    """Process-wide settings on which the last bits of numbers depend, and a quiet Lightning."""
    set_up_memory()
    torch.set_num_threads(config.trainer.threads)
    seed_global(stream_seed(config.seed, "global", *([rank] if rank else [])))
    torch.set_float32_matmul_precision(config.recipe.matmul_precision)
    # Its greetings and its advice about workers, which a corpus in memory does not need.
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
