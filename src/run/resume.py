"""Looks at an existing run folder: a finished run, one to continue, or a different run."""

from pathlib import Path
from typing import Any

from src.common import terminal
from src.common.errors import InputError
from src.common.read_checkpoint import load_state
from src.common.run_folder import RunFolder, lost_lines, read_metrics
from src.config.field_roles import role_of
from src.config.run_config import RunConfig


def is_path(resume: str) -> bool:
    """Whether the value of `resume` is the path of a checkpoint."""
    return resume not in ("auto", "never")


def finished_record(config: RunConfig, config_hash: str) -> dict[str, Any] | None:
    """The record of the finished run of this configuration; None if there is none.

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
            " type rerun=true to move it aside, or study=<name> for another folder"
        )
    record = folder.read_record()
    return record if record is not None and record["status"] == "finished" else None


def checkpoint_to_resume(folder: RunFolder, config: RunConfig, config_hash: str) -> Path | None:
    """The checkpoint to continue from; None: start at step 0.

    Raises:
        InputError: there is an unfinished run and resume=never, or the checkpoint cannot be used.
    """
    unfinished = folder.read_config() is not None
    if config.resume == "never":
        if unfinished:
            raise InputError(
                f"resume=never: {folder.path} holds an unfinished run; type resume=auto to continue"
                " it, or rerun=true to move it aside"
            )
        return None
    path = Path(config.resume) if is_path(config.resume) else folder.last_checkpoint()
    if path is None:
        return None
    found = load_state(path)
    begun = any(line["step"] <= found["global_step"] for line in read_metrics(folder.metrics))
    if unfinished and not begun:
        raise InputError(
            f"{folder.metrics}: has no lines up to the step of the checkpoint;"
            " type rerun=true to move the folder aside"
        )
    if found["config_hash"] != config_hash:
        differing = _difference(found["config"], config.plain())
        raise InputError(f"resume={path}: belongs to another configuration ({differing})")
    return path


def cut_metrics(folder: RunFolder, saved: dict[str, Any] | None) -> int:
    """Cuts metrics.jsonl to the step of a checkpoint.

    Lines may be missing after a crash. This is only a warning: training again is not worth it.

    Args:
        folder: the run folder.
        saved: the content of the checkpoint; None: the run starts at step 0.

    Returns:
        The number of lines that the run had written by then.
    """
    if saved is None:
        return folder.cut_metrics(step=-1)
    kept = folder.cut_metrics(step=saved["global_step"])
    # A run that continues from a checkpoint in another folder starts with an empty file.
    # Checkpoints of early versions do not hold the number.
    written: int = saved.get("metric_lines", kept) if kept else 0
    if kept < written:
        terminal.warn(f"{folder.metrics}: {lost_lines(kept, written)}")
    return max(kept, written)


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first field in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            field = f"{prefix}.{key}" if prefix else key
            # Fields that are not hashed cannot be the reason why the hashes differ.
            found = role_of(field).is_hashed and _difference(old.get(key), value, field)
            if found:
                return found
        return "" if prefix else "the data or the device"
    return "" if old == new else f"{prefix} was {old}, now {new}"
