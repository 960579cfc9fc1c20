"""The stages of a run, in the order of `run`: check, resume or start, build, fit, record."""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.common import storage, terminal
from src.common.environment import device_facts
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder
from src.common.tracking_address import default_uri
from src.config.run_config import RunConfig
from src.data import Corpus
from src.run import start_fork
from src.run.assemble import Assembly, assemble, model_for, vocab_size_for
from src.run.before_start import check_saved_state, load_corpus, ready_to_start
from src.run.callbacks import repeat_command
from src.run.ddp import FAILURE, Place, first_place, other_ranks
from src.run.metrics_writer import MetricsWriter
from src.run.outcome import SAMPLES, build_record, save_samples, show_record, writes_text
from src.run.process_setup import set_numerics
from src.run.resume import checkpoint_to_resume, cut_metrics, finished_record, is_path
from src.tracking.follow import MlflowMirror

logger = logging.getLogger(__name__)

SIGNAL_BASE = 128


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked run: its configuration, data, initialised model and folder."""

    config: RunConfig
    config_hash: str
    corpus: Corpus
    model: nn.Module
    folder: RunFolder


@dataclass(frozen=True, kw_only=True)
class Training:
    """An assembled run, and what records its progress."""

    parts: Assembly
    extras: dict[str, Any]
    """Plain values that every checkpoint holds, from `_extras`."""
    writer: MetricsWriter
    place: Place
    mirror: MlflowMirror | None


def run(config: RunConfig, *, corpus: Corpus | None = None) -> int:
    """Trains one run; returns the exit code.

    Args:
        config: its configuration.
        corpus: what `ready_to_start` has read; None: it is called here.

    Raises:
        InputError: the run cannot be started; nothing has been trained or written.
    """
    job = _load(config, ready_to_start(config) if corpus is None else corpus)
    finished = None if config.rerun else finished_record(config, job.config_hash)
    if finished is not None:
        return _show_finished(job, finished)
    _check_start(job)
    job.folder.open()
    try:
        saved, start = _start(job)
        if job.config.audit and saved is None:
            _warn_of_limits(job)
        training = _build(job, saved)
        status = _fit_with_others(job, training, start)
        record = _record(job, training, status)
        return _end(job, training, record)
    except OSError as error:
        return _storage_failure(job.folder, error)
    finally:
        job.folder.close()


def _load(config: RunConfig, corpus: Corpus, *, rank: int = 0) -> Job:
    """Sets up this process and initialises the model."""
    set_numerics(config, rank=rank)
    model = model_for(config, corpus)
    config = replace(config, notes=[*config.notes, *config.architecture.notes(model)])
    return Job(
        config=config,
        config_hash=config.config_hash(corpus.fingerprint),
        corpus=corpus,
        model=model,
        folder=RunFolder(config.folder),
    )


def _check_start(job: Job) -> None:
    """Checks the state that the run starts from, then moves an old run aside for rerun=true."""
    config = job.config
    if config.fork is not None:
        # A checkpoint to resume was checked before the run was announced; reading it takes long.
        check_saved_state(config, job.config_hash)
    if config.rerun:
        aside = job.folder.move_aside()
        if aside is not None:
            terminal.say(f"the old run was moved to {aside}")
    for note in config.notes:
        terminal.warn(note)


def _start(job: Job) -> tuple[dict[str, Any] | None, Path | None]:
    """Prepares the folder; returns the saved state to continue from and its file.

    A run that starts at step 0 has neither: both are None.
    """
    config, folder = job.config, job.folder
    if config.fork is not None and folder.read_config() is None:
        start_fork.begin(config, config.fork, folder, config_hash=job.config_hash)
    # Checked again, because another process could write to the folder until it was locked.
    start = checkpoint_to_resume(folder, config, job.config_hash)
    folder.write_config(config.plain(), config_hash=job.config_hash)
    # If this process is killed, the record of an earlier, unfinished one must not remain.
    (folder.path / "record.json").unlink(missing_ok=True)
    return (None if start is None else load_state(start)), start


def _warn_of_limits(job: Job) -> None:
    """Prints what an audit of the model finds."""
    # Loads the tools of post-mortems, which no other run needs.
    from src.run.audit_start import warnings_before_start

    lines = warnings_before_start(job.config, job.model, job.corpus)
    for line in lines or ["audit: nothing non-finite is within reach in this precision"]:
        terminal.warn(line) if lines else terminal.say(line)


def _build(job: Job, saved: dict[str, Any] | None) -> Training:
    """Assembles the run and starts mirroring it into MLflow."""
    extras = _extras(job, saved)
    place = first_place(job.config.trainer.devices)
    writer = MetricsWriter(job.folder.metrics, num_lines=cut_metrics(job.folder, saved))
    parts = _assemble(job, extras, writer=writer, place=place)
    mirror = _mirror(job.config, job.folder)
    return Training(parts=parts, extras=extras, writer=writer, place=place, mirror=mirror)


def _assemble(
    job: Job, extras: dict[str, Any], *, writer: MetricsWriter | None, place: Place
) -> Assembly:
    return assemble(
        job.config,
        model=job.model,
        corpus=job.corpus,
        folder=job.folder,
        writer=writer,
        place=place,
        checkpoint_extras=extras,
    )


def _fit_with_others(job: Job, training: Training, start: Path | None) -> str:
    """Trains, together with the other ranks if there are any; returns the status."""
    arguments, folder = job.config.arguments, job.folder
    try:
        with other_ranks(training.place, arguments=arguments, start=start, folder=folder.path):
            return _fit(training.parts, start, folder)
    except RuntimeError as error:
        terminal.error(str(error))
        return "failed"
    finally:
        training.writer.close()


def _fit(parts: Assembly, start: Path | None, folder: RunFolder) -> str:
    """Trains; returns the status: finished, killed or failed.

    An error is logged with its traceback; the terminal shows one line.

    Raises:
        OSError: the run folder cannot be written, so no record can be written either.
    """
    try:
        parts.trainer.fit(
            parts.task, train_dataloaders=parts.batches, ckpt_path=start, weights_only=True
        )
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns a second Ctrl-C into SystemExit. The last checkpoint stays valid.
        parts.callbacks.interrupt.signal = parts.callbacks.interrupt.signal or signal.SIGINT
        return "killed"
    except Exception as error:
        if storage.is_of(folder.path, error):
            raise
        logger.exception("the run failed")
        terminal.error(f"{type(error).__name__}: {error}")
        return "failed"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return "killed" if parts.callbacks.interrupt.stopped else "finished"


def _record(job: Job, training: Training, status: str) -> dict[str, Any]:
    """Writes record.json and, for a finished run, samples.md; then sends the rest to MLflow."""
    record = build_record(
        job.config,
        training.parts,
        job.folder,
        vocab_size=vocab_size_for(job.config, job.corpus),
        config_hash=job.config_hash,
        status=status,
        extras=training.extras,
        metric_lines=training.writer.num_lines,
    )
    job.folder.write_record(record)
    if status == "finished":
        _write_samples(job, training.parts)
    if training.mirror is not None:
        training.mirror.finish()
    return record


def _end(job: Job, training: Training, record: dict[str, Any]) -> int:
    """Shows the result; returns the exit code."""
    show_record(record, job.folder, repeat=repeat_command(job.config))
    if record["status"] == "killed":
        number = training.parts.callbacks.interrupt.signal
        assert number is not None
        how = "the same command without rerun=true" if job.config.rerun else "the same command"
        terminal.say(f"stopped by a signal; to continue, run {how}")
        return SIGNAL_BASE + number
    return 0 if record["status"] == "finished" else FAILURE


def _show_finished(job: Job, record: dict[str, Any]) -> int:
    """Shows the record of a run that had finished before; returns the exit code."""
    if is_path(job.config.resume):
        raise InputError(f"resume={job.config.resume}: {job.folder.path} is already finished")
    terminal.say(f"{job.folder.path} is already finished; type rerun=true to train it again")
    for note in record["notes"]:
        terminal.warn(note)
    _add_missing_samples(job)
    show_record(record, job.folder, repeat=repeat_command(job.config))
    return 0


def _add_missing_samples(job: Job) -> None:
    """Writes samples.md if the run was killed after its record and before its samples."""
    if (job.folder.path / SAMPLES).is_file() or not job.folder.last.is_file():
        return
    if not writes_text(job.model, job.corpus):
        return
    saved = load_state(job.folder.last)
    place = first_place(job.config.trainer.devices)
    parts = _assemble(job, _extras(job, saved), writer=None, place=place)
    parts.task.load_state_dict(saved["state_dict"])
    for callback in parts.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "evaluation_weights"):
            callback.load_state_dict(saved["callbacks"][callback.state_key])
            callback.on_fit_start(parts.trainer, parts.task)
    _write_samples(job, parts)


def _write_samples(job: Job, parts: Assembly) -> None:
    """Writes samples.md and deletes old checkpoints; an error here does not fail the run."""
    try:
        save_samples(job.config, parts, job.corpus, job.folder)
        if job.config.study != "single":
            job.folder.drop_all_but_last_checkpoint()
    except Exception as error:
        logger.exception("samples could not be written")
        terminal.warn(
            f"{job.folder.path}: the run finished, but its samples could not be written"
            f" ({type(error).__name__}: {error}); run the same command to try again"
        )


def _storage_failure(folder: RunFolder, error: OSError) -> int:
    """Ends a run whose folder cannot be written any more, for example because the disk is full.

    Raises:
        OSError: the error does not concern the run folder.
    """
    if not storage.is_of(folder.path, error):
        raise error
    logger.error("the run folder cannot be written", exc_info=error)
    trouble = storage.trouble(error, folder.path)
    terminal.error(f"{trouble}; the same command continues from the last checkpoint")
    return FAILURE


def _extras(job: Job, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Plain values that every checkpoint holds.

    Args:
        job: the run.
        saved: the state that the run continues from; None: it starts at step 0.
    """
    plain = job.config.plain()
    return {
        "config": plain,
        "config_hash": job.config_hash,
        "tokenizer": job.corpus.tokenizer.state(),
        "derived_from": None if saved is None else saved["derived_from"],
        # Only observers that have seen every step: one that was added on resuming missed some.
        "observed": {
            name: fields
            for name, fields in plain["observe"].items()
            if saved is None or saved["observed"].get(name) == fields
        },
        "origins": start_fork.origins_of(saved),
    }


def follow(
    config: RunConfig, *, place: Place, start: Path | None, ready: Callable[[], None]
) -> int:
    """The life of a rank other than 0: trains its share of the rows, writes only incidents.

    Args:
        config: the run's configuration, which rank 0 has checked.
        place: the place of this process.
        start: the checkpoint to continue from; None: start at step 0.
        ready: called right before training.
    """
    job = _load(config, load_corpus(config), rank=place.rank)
    saved = None if start is None else load_state(start)
    parts = _assemble(job, _extras(job, saved), writer=None, place=place)
    ready()
    return FAILURE if _fit(parts, start, job.folder) == "failed" else 0


def _mirror(config: RunConfig, folder: RunFolder) -> MlflowMirror | None:
    """Starts mirroring the run folder into MLflow; None if tracking.mlflow is off."""
    if not config.tracking.mlflow:
        return None
    mirror = MlflowMirror(
        folder.path,
        uri=config.tracking.uri or default_uri(),
        device=device_facts(torch.device(config.trainer.device_type)),
        parent_run_id=config.tracking.parent_run_id,
        warn=terminal.warn,
    )
    mirror.start()
    return mirror
