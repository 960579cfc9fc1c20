"""Checkpoints and other files of tensors, read without running code from them."""

import functools
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from src.common.errors import InputError

EXTERNAL = "external"
"""The kind of a model that is the user's own, and of its parts."""

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""In the folder of a run or of a converted model."""

EMBEDDING = "model.embedding.weight"
"""In every checkpoint of weights; its rows are the vocabulary."""


def load_state(path: Path, *, field: str = "resume") -> dict[str, Any]:
    """Reads the whole state of a run, to go on from it.

    Args:
        path: the file.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it is missing, damaged, or no checkpoint of ours.
    """
    state = read_tensors(path, field=field)
    if "conversion" in state:
        raise InputError(f"{field}={path}: is a converted model; init={path} trains it on")
    needed = {"state_dict", "config", "config_hash", "global_step", "rng"}
    needed |= {"derived_from", "observed"}
    if not needed <= set(state):
        raise InputError(f"{field}={path}: is no checkpoint of this project")
    return state


def load_model(path: Path, *, field: str) -> dict[str, Any]:
    """Reads what a model and its tokenizer are made of from a checkpoint, of a run or converted.

    Args:
        path: the file.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it is missing, damaged, or no checkpoint of ours.
    """
    state = read_tensors(path, field=field)
    weights, config = state.get("state_dict"), state.get("config")
    sections = {"model", "attention", "ffn", "recipe", "kinds", "choices"}
    known = isinstance(weights, dict) and isinstance(config, dict) and sections <= set(config)
    if isinstance(config, dict) and config.get("choices", {}).get("model") == EXTERNAL:
        raise InputError(f"{field}={path}: has an external model, which its target alone can build")
    if not known or (weights and EMBEDDING not in weights) or "tokenizer" not in state:
        raise InputError(f"{field}={path}: is no checkpoint of this project")
    return state


def checkpoint_of(place: Path, *, field: str) -> Path:
    """The checkpoint that a run folder, a converted model's folder or a file stands for.

    Args:
        place: as it was typed.
        field: what for, named in errors.

    Raises:
        InputError: there is none.
    """
    if not place.exists():
        raise InputError(f"{field}={place}: no such run folder or checkpoint")
    if place.is_file():
        return place
    if not (place / "config.yaml").is_file():
        raise InputError(
            f"{field}={place}: is no run folder, which is runs/<study>/<variant>/seed-<n> and"
            " holds config.yaml"
        )
    last = place / CHECKPOINT
    if not last.is_file():
        others = sorted(last.parent.glob("step-*.ckpt"))
        hint = f"; {field}={others[-1]} is another" if others else ""
        raise InputError(f"{field}={place}: has no checkpoint {last.name} yet{hint}")
    return last


def read_tensors(path: Path, *, field: str) -> dict[str, Any]:
    """Reads a file of tensors and plain containers without running code from it.

    Args:
        path: the file.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it is missing, damaged, or something else.
    """
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
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign is not None:
            raise InputError(
                f"{field}={path}: holds a {foreign[1]}, and is read without running code from it;"
                " save tensors and plain values alone"
            ) from error
        advice = "; resume=<another checkpoint> or rerun=true starts without it"
        raise InputError(
            f"{field}={path}: is damaged or no checkpoint{advice if field == 'resume' else ''}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{field}={path}: is no checkpoint of this project")
    return content


def check_sums(path: Path) -> None:
    """Raises BadZipFile where a record of a file that torch has saved fails its checksum.

    torch.save writes a CRC-32 for every record, the data of each tensor among them, and torch.load
    looks at none: a flipped bit would be trained on. Costs 24 ms for 50 MB, where torch.load needs
    40 ms to read the same and 3 ms to map it. Files of safetensors and GGUF hold no checksums.
    """
    facts = path.stat()
    _check_sums(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _check_sums(path: Path, size: int, changed: int) -> None:
    """Once for each state of a file, because a sweep composes every cell from the same init."""
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
    except OSError:
        raise
    # A flipped bit in a header may name any compression or encryption, each with its own errors.
    except Exception as error:
        raise zipfile.BadZipFile(str(error)) from error
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} fails its checksum")
