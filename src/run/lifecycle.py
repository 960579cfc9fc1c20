"""A run's life: fresh, resumed or finished already; trained; recorded."""

import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src import terminal
from src.compiling import check_compiler
from src.config import UNCOMPARED, RunConfig
from src.data import Corpus
from src.errors import InputError
from src.run import forking
from src.run.assemble import (
    Assembly,
    assemble,
    model_for,
    set_numerics,
    vocab_size_for,
)
from src.run.outcome import build_record, save_samples, show_record
from src.run.ranks import FAILURE, Place, first_place, others
from src.saved import load_state
from src.tracking.client import default_uri
from src.tracking.facts import device_facts
from src.tracking.folder import RunFolder, read_metrics
from src.tracking.mirror import MlflowMirror
from src.tracking.writer import MetricsWriter

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
            show_record(finished, folder)
            return 0
    # Before anything is written, so that bad input leaves nothing behind.
    if not config.rerun:
        _checkpoint_to_resume(folder, config, config_hash)
    if config.fork is not None:
        forking.check(config, config.fork)
    if config.rerun:
        aside = folder.move_aside()
        if aside is not None:
            terminal.say(f"the old run was moved to {aside}")
    for note in config.notes:
        terminal.warn(note)
    folder.open()
    try:
        if config.fork is not None and folder.read_config() is None:
            forking.begin(config, config.fork, folder, config_hash=config_hash)
        # Once more: only now no other process can write here.
        start = _checkpoint_to_resume(folder, config, config_hash)
        return _train(config, model, corpus, folder, config_hash, start)
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
    extras, step = _extras(config, corpus, config_hash, start)
    folder.cut_metrics(step=step)
    writer = MetricsWriter(folder.metrics)
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
    status = _fit_with_others(run, config, place, start, folder)
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
    )
    folder.write_record(record)
    if status == "finished":
        save_samples(config, run, corpus, folder)
    if status == "finished" and config.study != "single":
        folder.drop_all_but_last_checkpoint()
    if mirror is not None:
        mirror.finish()
    show_record(record, folder)
    if status == "killed":
        assert run.interrupt.signal is not None
        how = "the same command without rerun=true" if config.rerun else "the same command"
        terminal.say(f"stopped by a signal; {how} continues")
        return SIGNAL_BASE + run.interrupt.signal
    return 0 if status == "finished" else FAILURE


def _extras(
    config: RunConfig, corpus: Corpus, config_hash: str, start: Path | None
) -> tuple[dict[str, Any], int]:
    """Plain values that checkpoints carry, and the step from which the run goes on, or -1."""
    saved = None if start is None else load_state(start)
    plain = config.plain()
    extras = {
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
        "origins": forking.origins_of(saved),
    }
    return extras, -1 if saved is None else saved["global_step"]


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
    extras, _ = _extras(config, corpus, config.config_hash(), start)
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
    return FAILURE if _fit(run, start) == "failed" else 0


def _fit_with_others(
    run: Assembly, config: RunConfig, place: Place, start: Path | None, folder: RunFolder
) -> str:
    """Trains, beside the other processes of the run where it has several."""
    try:
        with others(place, arguments=config.arguments, start=start, folder=folder.path):
            return _fit(run, start)
    except RuntimeError as error:
        terminal.error(str(error))
        return "failed"


def _fit(run: Assembly, start: Path | None) -> str:
    """Trains; returns the status. An error of the run is logged whole and shown in one line."""
    try:
        run.trainer.fit(run.task, train_dataloaders=run.batches, ckpt_path=start, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        # A second Ctrl-C, which Lightning turns into an exit; the last checkpoint stands.
        run.interrupt.signal = run.interrupt.signal or signal.SIGINT
        return "killed"
    except Exception as error:
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
