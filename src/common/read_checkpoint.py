"""Reads checkpoints and other tensor files without running code from them."""

import functools
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from src.common.errors import InputError

EXTERNAL = "external"
"""The kind recorded for a user's own model and for its parts."""

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Path of the checkpoint inside the folder of a run or of a converted model."""

STATE = "state.pt"
"""File name of the saved state in an incident's folder."""

EMBEDDING = "model.embedding.weight"
"""A key that every checkpoint with weights has; its rows are the vocabulary."""


def load_state(path: Path, *, field: str = "resume") -> dict[str, Any]:
    """Reads the whole state of a run, to resume it.

    Args:
        path: the file.
        field: the field that holds the path, named in errors.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this project.
    """
    state = read_tensors(path, field=field)
    if "conversion" in state:
        raise InputError(f"{field}={path}: is a converted model; init={path} trains it on")
    needed = {"state_dict", "config", "config_hash", "global_step", "rng"}
    needed |= {"derived_from", "observed"}
    if not needed <= set(state):
        raise InputError(f"{field}={path}: is not a checkpoint of this project")
    return state


def load_model(path: Path, *, field: str) -> dict[str, Any]:
    """Reads the model and tokenizer from the checkpoint of a run or of a converted model.

    Args:
        path: the file.
        field: the field that holds the path, named in errors.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this project.
    """
    state = read_tensors(path, field=field)
    weights, config = state.get("state_dict"), state.get("config")
    sections = {"model", "attention", "ffn", "recipe", "kinds", "choices"}
    known = isinstance(weights, dict) and isinstance(config, dict) and sections <= set(config)
    if isinstance(config, dict) and config.get("choices", {}).get("model") == EXTERNAL:
        raise InputError(
            f"{field}={path}: has an external model, which only its model.target can build"
        )
    if not known or (weights and EMBEDDING not in weights) or "tokenizer" not in state:
        raise InputError(f"{field}={path}: is not a checkpoint of this project")
    return state


def checkpoint_of(place: Path, *, field: str) -> Path:
    """The checkpoint file that a run folder, a converted model's folder or a file refers to.

    Args:
        place: the path as the user typed it.
        field: the field that holds the path, named in errors.

    Raises:
        InputError: there is no checkpoint.
    """
    if not place.exists():
        raise InputError(f"{field}={place}: no such run folder or checkpoint")
    if place.is_file():
        return place
    if not (place / "config.yaml").is_file():
        raise InputError(
            f"{field}={place}: is not a run folder; a run folder is runs/<study>/<variant>/seed-<n>"
            " and holds config.yaml"
        )
    last = place / CHECKPOINT
    if not last.is_file():
        others = sorted(last.parent.glob("step-*.ckpt"))
        hint = f"; there is {field}={others[-1]}" if others else ""
        raise InputError(f"{field}={place}: has no checkpoint {last.name} yet{hint}")
    return last


def read_tensors(path: Path, *, field: str) -> dict[str, Any]:
    """Reads a file of tensors and plain containers without running code from it.

    Args:
        path: the file.
        field: the field that holds the path, named in errors.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    # Imported here, because the checks of names and the records of runs need no tensors.
    import torch

    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"{field}={path}: no such checkpoint") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unsafe is not None:
            raise InputError(
                f"{field}={path}: holds a {unsafe[1]}, which cannot be read without running code;"
                " save model.state_dict() with torch.save, or other tensors and plain values"
            ) from error
        advice = "; type resume=<another checkpoint>, or rerun=true to start again"
        raise InputError(
            f"{field}={path}: is damaged or not a checkpoint{advice if field == 'resume' else ''}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{field}={path}: is not a checkpoint of this project")
    return content


def check_sums(path: Path) -> None:
    """Raises BadZipFile if a record of a file written by torch.save fails its checksum.

    torch.save writes a CRC-32 for every record, including the data of each tensor, but torch.load
    checks none of them: a flipped bit would go into training unnoticed. The check takes 24 ms for
    50 MB; torch.load takes 40 ms to read the same file and 3 ms to map it. Safetensors and GGUF
    files hold no checksums.
    """
    facts = path.stat()
    _check_sums(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _check_sums(path: Path, size: int, changed: int) -> None:
    """Cached for each state of a file, because a sweep composes every arm from the same init."""
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
    except OSError:
        raise
    # A flipped bit in a header may select any compression or encryption, each with its own errors.
    except Exception as error:
        raise zipfile.BadZipFile(str(error)) from error
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} fails its checksum")
