"""A run's life: fresh, resumed or finished already; trained; recorded."""

import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.common import storage, terminal
from src.common.environment import device_facts
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder, lost_lines, read_metrics
from src.config.compile_choice import check_compiler
from src.config.run_config import UNCOMPARED, RunConfig
from src.data import Corpus
from src.run import start_fork
from src.run.assemble import (
    Assembly,
    assemble,
    model_for,
    repeat_command,
    set_numerics,
    vocab_size_for,
)
from src.run.ddp import FAILURE, Place, first_place, others
from src.run.metrics_writer import MetricsWriter
from src.run.outcome import SAMPLES, build_record, save_samples, show_record, writes_text
from src.tracking.client import default_uri
from src.tracking.follow import MlflowMirror

logger = logging.getLogger(__name__)

SIGNAL_BASE = 128


def run(config: RunConfig) -> int:
    """Trains one composition and returns the exit code of its end.

    Raises:
        InputError: before anything is trained or written.
    """
    config.trainer.check_device()
    check_compiler(compiled=config.compile, device=config.trainer.device_type)
    if config.tracking.mlflow and config.tracking.uri is None:
        default_uri()  # checked before anything is written
    set_numerics(config)
    explicit = config.resume not in ("auto", "never")
    if config.rerun and explicit:
        raise InputError(f"resume={config.resume}: rerun=true starts anew; leave one of them out")
    if config.fork is not None and config.resume != "auto":
        raise InputError(f"resume={config.resume}: a fork begins from its own state; leave it out")
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    model = model_for(config, corpus)
    config = replace(config, notes=[*config.notes, *config.architecture.notes(model)])
    config_hash = config.config_hash()
    folder = RunFolder(config.folder)
    if not config.rerun:
        finished = finished_record(config, config_hash)
        if finished is not None:
            if explicit:
                raise InputError(f"resume={config.resume}: {folder.path} is finished already")
            terminal.say(f"{folder.path} is finished already; rerun=true trains it again")
            for note in finished["notes"]:
                terminal.warn(note)
            _samples_again(config, model, corpus, folder, config_hash)
            show_record(finished, folder, repeat=repeat_command(config))
            return 0
    # Before anything is written, so that bad input leaves nothing behind.
    if not config.rerun:
        _checkpoint_to_resume(folder, config, config_hash)
    if config.fork is not None:
        start_fork.check(config, config.fork)
    if config.rerun:
        aside = folder.move_aside()
        if aside is not None:
            terminal.say(f"the old run was moved to {aside}")
    for note in config.notes:
        terminal.warn(note)
    folder.open()
    try:
        if config.fork is not None and folder.read_config() is None:
            start_fork.begin(config, config.fork, folder, config_hash=config_hash)
        # Once more: only now no other process can write here.
        start = _checkpoint_to_resume(folder, config, config_hash)
        return _train(config, model, corpus, folder, config_hash, start)
    except OSError as error:
        if not storage.is_of(folder.path, error):
            raise
        logger.exception("the run folder cannot be written")
        terminal.error(
            f"{storage.trouble(error, folder.path)}; the same command goes on from the last"
            " checkpoint"
        )
        return FAILURE
    finally:
        folder.close()


def finished_record(config: RunConfig, config_hash: str) -> dict[str, Any] | None:
    """The record of a finished run of this configuration; None where it has not finished.

    Raises:
        InputError: the folder holds a run of another configuration, or is damaged.
    """
    folder = RunFolder(config.folder)
    known = folder.read_config()
    if known is None:
        return None
    if known["config_hash"] != config_hash:
        differing = _difference(known, config.plain())
        raise InputError(
            f"{folder.path}: holds a run of another configuration ({differing});"
            " rerun=true moves it aside, study=<name> puts this one elsewhere"
        )
    record = folder.read_record()
    return record if record is not None and record["status"] == "finished" else None


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first field in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            if key in UNCOMPARED:
                continue
            found = _difference(old.get(key), value, f"{prefix}.{key}" if prefix else key)
            if found:
                return found
        return "" if prefix else "the data or the device"
    return "" if old == new else f"{prefix} was {old}, now {new}"


def _checkpoint_to_resume(folder: RunFolder, config: RunConfig, config_hash: str) -> Path | None:
    """Where to go on from; None starts from nothing."""
    unfinished = folder.read_config() is not None
    if config.resume == "never":
        if unfinished:
            raise InputError(
                f"resume=never: {folder.path} holds an unfinished run; resume=auto continues it,"
                " rerun=true moves it aside"
            )
        return None
    path = folder.last_checkpoint() if config.resume == "auto" else Path(config.resume)
    if path is None:
        return None
    found = load_state(path)
    begun = any(line["step"] <= found["global_step"] for line in read_metrics(folder.metrics))
    if unfinished and not begun:
        raise InputError(
            f"{folder.metrics}: ends before the checkpoint that it belongs to;"
            " rerun=true moves the folder aside"
        )
    if found["config_hash"] != config_hash:
        differing = _difference(found["config"], config.plain())
        raise InputError(f"resume={path}: belongs to another configuration ({differing})")
    return path


def _train(
    config: RunConfig,
    model: Any,
    corpus: Corpus,
    folder: RunFolder,
    config_hash: str,
    start: Path | None,
) -> int:
    folder.write_config(config.plain(), config_hash=config_hash)
    # The record of an earlier, unfinished process would outlive a kill of this one.
    (folder.path / "record.json").unlink(missing_ok=True)
    saved = None if start is None else load_state(start)
    extras = _extras(config, corpus, config_hash, saved)
    writer = MetricsWriter(folder.metrics, num_lines=_cut_metrics(folder, saved))
    place = first_place(config.trainer.devices)
    run = assemble(
        config,
        model=model,
        corpus=corpus,
        folder=folder,
        writer=writer,
        place=place,
        checkpoint_extras=extras,
    )
    mirror = _mirror(config, folder)
    try:
        status = _fit_with_others(run, config, place, start, folder)
    finally:
        writer.close()
    record = build_record(
        config,
        run,
        folder,
        vocab_size=vocab_size_for(config, corpus),
        config_hash=config_hash,
        status=status,
        derived_from=extras["derived_from"],
        origins=extras["origins"],
        metric_lines=writer.num_lines,
    )
    folder.write_record(record)
    if status == "finished":
        _finish(config, run, corpus, folder)
    if mirror is not None:
        mirror.finish()
    show_record(record, folder, repeat=repeat_command(config))
    if status == "killed":
        assert run.interrupt.signal is not None
        how = "the same command without rerun=true" if config.rerun else "the same command"
        terminal.say(f"stopped by a signal; {how} continues")
        return SIGNAL_BASE + run.interrupt.signal
    return 0 if status == "finished" else FAILURE


def _finish(config: RunConfig, run: Assembly, corpus: Corpus, folder: RunFolder) -> None:
    """What comes after the record, and whose failure leaves it and its way to MLflow alone."""
    try:
        save_samples(config, run, corpus, folder)
        if config.study != "single":
            folder.drop_all_but_last_checkpoint()
    except Exception as error:
        logger.exception("after the record")
        terminal.warn(
            f"{folder.path}: is finished, but its samples could not be written"
            f" ({type(error).__name__}: {error}); the same command tries again"
        )


def _samples_again(
    config: RunConfig, model: Any, corpus: Corpus, folder: RunFolder, config_hash: str
) -> None:
    """Makes samples.md where the run came to its end between its record and its samples."""
    if (folder.path / SAMPLES).is_file() or not folder.last.is_file():
        return
    if not writes_text(model, corpus):
        return
    saved = load_state(folder.last)
    run = assemble(
        config,
        model=model,
        corpus=corpus,
        folder=folder,
        writer=None,
        place=first_place(config.trainer.devices),
        checkpoint_extras=_extras(config, corpus, config_hash, saved),
    )
    run.task.load_state_dict(saved["state_dict"])
    for callback in run.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "evaluation_weights"):
            callback.load_state_dict(saved["callbacks"][callback.state_key])
            callback.on_fit_start(run.trainer, run.task)
    _finish(config, run, corpus, folder)


def _cut_metrics(folder: RunFolder, saved: dict[str, Any] | None) -> int:
    """Brings metrics.jsonl back to a checkpoint; returns how many lines the run wrote until then.

    Some of them may be lost, which is no reason to train the whole run again.
    """
    if saved is None:
        return folder.cut_metrics(step=-1)
    kept = folder.cut_metrics(step=saved["global_step"])
    # A run that goes on from another folder's checkpoint begins with an empty file, and a
    # checkpoint of before it was kept says nothing.
    written: int = saved.get("metric_lines", kept) if kept else 0
    if kept < written:
        terminal.warn(f"{folder.metrics}: {lost_lines(kept, written)}")
    return max(kept, written)


def _extras(
    config: RunConfig, corpus: Corpus, config_hash: str, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """Plain values that checkpoints carry.

    Args:
        config: of the run.
        corpus: its text.
        config_hash: of the configuration.
        saved: the state from which the run goes on; None: it begins.
    """
    plain = config.plain()
    return {
        "config": plain,
        "config_hash": config_hash,
        "tokenizer": corpus.tokenizer.state(),
        "derived_from": None if saved is None else saved["derived_from"],
        # What a resumed run newly carries has not seen its first steps.
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
    """Another process of a run than the first: trains its rows, and writes no file of the run.

    Args:
        config: of the run; the first process has checked it.
        place: of this process.
        start: the checkpoint from which the run goes on.
        ready: called before training.
    """
    set_numerics(config, rank=place.rank)
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    saved = None if start is None else load_state(start)
    extras = _extras(config, corpus, config.config_hash(), saved)
    run = assemble(
        config,
        model=model_for(config, corpus),
        corpus=corpus,
        folder=RunFolder(config.folder),
        writer=None,
        place=place,
        checkpoint_extras=extras,
    )
    ready()
    return FAILURE if _fit(run, start, RunFolder(config.folder)) == "failed" else 0


def _fit_with_others(
    run: Assembly, config: RunConfig, place: Place, start: Path | None, folder: RunFolder
) -> str:
    """Trains, beside the other processes of the run where it has several."""
    try:
        with others(place, arguments=config.arguments, start=start, folder=folder.path):
            return _fit(run, start, folder)
    except RuntimeError as error:
        terminal.error(str(error))
        return "failed"


def _fit(run: Assembly, start: Path | None, folder: RunFolder) -> str:
    """Trains; returns the status. An error of the run is logged whole and shown in one line.

    Raises:
        OSError: the run folder cannot be written, so that there is no record to write either.
    """
    try:
        run.trainer.fit(run.task, train_dataloaders=run.batches, ckpt_path=start, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        # A second Ctrl-C, which Lightning turns into an exit; the last checkpoint stands.
        run.interrupt.signal = run.interrupt.signal or signal.SIGINT
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
    return "killed" if run.interrupt.stopped else "finished"


def _mirror(config: RunConfig, folder: RunFolder) -> MlflowMirror | None:
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
