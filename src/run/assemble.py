"""Builds the model, task, data, callbacks and trainer of a run from its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from src.checkpoint.init_from import load_initial
from src.common.errors import InputError
from src.common.random_streams import generator
from src.common.run_folder import RunFolder
from src.config.memory_estimate import check_memory
from src.config.run_config import RunConfig
from src.data import Corpus, TrainBatches
from src.model import Transformer
from src.run.callbacks import Callbacks, build_callbacks
from src.run.ddp import Place, Ranks
from src.run.metrics_writer import MetricsWriter
from src.training.checkpoint_writer import StraightToFile
from src.training.task import LanguageModelTask


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run that training, and the record after it, need."""

    task: LanguageModelTask
    trainer: pl.Trainer
    batches: TrainBatches
    callbacks: Callbacks


def vocab_size_for(config: RunConfig, corpus: Corpus) -> int:
    """The size of the model's vocabulary.

    Raises:
        InputError: the tokenizer has more tokens than the model's fixed vocabulary.
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
        InputError: the tokenizer has more tokens than the model, the model does not fit into this
            machine's memory, or an external model is not usable.
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
    """Creates the callbacks, the task, the data and the trainer.

    Args:
        config: the run's configuration.
        model: the model to train.
        corpus: the text to train on.
        folder: the run folder.
        writer: writes the metrics in the first process; None in the others, which write no metrics.
        place: rank of this process, and the number of processes.
        checkpoint_extras: plain values to store in every checkpoint.
    """
    recipe = config.recipe
    callbacks = build_callbacks(
        config, corpus=corpus, folder=folder, writer=writer, checkpoint_extras=checkpoint_extras
    )
    trainer = pl.Trainer(
        accelerator="gpu" if config.trainer.device_type == "cuda" else "cpu",
        devices=config.trainer.devices,
        strategy=_ddp_strategy(model) if place.world_size > 1 else "auto",
        plugins=[Ranks(place), StraightToFile()],
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=recipe.max_steps,
        accumulate_grad_batches=recipe.accumulate,
        callbacks=callbacks.in_order,
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
        guard=callbacks.guard,
        lr_factor=config.lr_factor,
        replace_optimizer=config.replace_optimizer,
        checkpoint_extras=dict(checkpoint_extras),
        compiled=config.compile,
    )
    batches = TrainBatches(
        corpus.train,
        seed=config.seed,
        batch_size=recipe.batch_size,
        seq_len=recipe.seq_len,
        first=lambda: trainer.global_step * recipe.accumulate,
        accumulate=recipe.accumulate,
        poison=config.poison,
        rank=place.rank,
        world_size=place.world_size,
    )
    return Assembly(task=task, trainer=trainer, batches=batches, callbacks=callbacks)


def _ddp_strategy(model: nn.Module) -> DDPStrategy:
    # A trainable router bias gets no gradient while it is frozen or if it only selects experts. An
    # external model may have such weights too. Searching for them walks the graph every step, so it
    # is done only for these models.
    may_lack_gradients = not isinstance(model, Transformer) or any(
        isinstance(router.bias_E, nn.Parameter) for router in model.routers()
    )
    # Not broadcast, because each process has its own buffers: a router counts the tokens of its own
    # rows, and the counts are summed only by finish_batch or finish_step.
    return DDPStrategy(broadcast_buffers=False, find_unused_parameters=may_lack_gradients)
