"""What is in a run's folder already: a finished run, one to continue, or one that is different."""

from pathlib import Path
from typing import Any

from src.common import terminal
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder, lost_lines, read_metrics
from src.config.field_roles import role_of
from src.config.run_config import RunConfig


def is_path(resume: str) -> bool:
    """Whether resume= names a checkpoint."""
    return resume not in ("auto", "never")


def finished_record(config: RunConfig, config_hash: str) -> dict[str, Any] | None:
    """The record of a finished run of this configuration; None if it has not finished.

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


def checkpoint_to_resume(folder: RunFolder, config: RunConfig, config_hash: str) -> Path | None:
    """The checkpoint from which to continue; None starts from step 0.

    Raises:
        InputError: there is an unfinished run and resume=never, or the checkpoint cannot be used.
    """
    unfinished = folder.read_config() is not None
    if config.resume == "never":
        if unfinished:
            raise InputError(
                f"resume=never: {folder.path} holds an unfinished run; resume=auto continues it,"
                " rerun=true moves it aside"
            )
        return None
    path = Path(config.resume) if is_path(config.resume) else folder.last_checkpoint()
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


def cut_metrics(folder: RunFolder, saved: dict[str, Any] | None) -> int:
    """Cuts metrics.jsonl to a checkpoint; returns the number of lines that the run had written.

    Lines may be missing after a crash. That is a warning and no reason to train again.

    Args:
        folder: of the run.
        saved: the checkpoint's content; None: the run starts.
    """
    if saved is None:
        return folder.cut_metrics(step=-1)
    kept = folder.cut_metrics(step=saved["global_step"])
    # A run that continues from a checkpoint in another folder starts with an empty file, and old
    # checkpoints do not hold the number.
    written: int = saved.get("metric_lines", kept) if kept else 0
    if kept < written:
        terminal.warn(f"{folder.metrics}: {lost_lines(kept, written)}")
    return max(kept, written)


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first field in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            field = f"{prefix}.{key}" if prefix else key
            # Runs of one hash may differ in fields that are not hashed, so these explain nothing.
            found = role_of(field).is_hashed and _difference(old.get(key), value, field)
            if found:
                return found
        return "" if prefix else "the data or the device"
    return "" if old == new else f"{prefix} was {old}, now {new}"
