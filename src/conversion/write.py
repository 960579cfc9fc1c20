"""Writes a converted model atomically."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from torch import Tensor

from src.checkpoint.rebuild import PREFIX, kinds_of
from src.checkpoint.trained_model import TrainedModel
from src.common.errors import InputError
from src.common.read_checkpoint import CHECKPOINT
from src.common.run_folder import read_json, write_json
from src.config.field_roles import without_off
from src.conversion.huggingface import WEIGHTS, write_folder
from src.conversion.llama_weights import llama_config, weights_to_llama
from src.conversion.vocabulary import as_library

REPORT = "conversion.json"


def written_already(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder already holds this conversion.

    Args:
        out: the output folder.
        settings: everything that the result depends on.

    Raises:
        InputError: the folder holds something else, or cannot be read.
    """
    try:
        is_file = out.is_file()
        is_new = not is_file and (not out.exists() or not any(out.iterdir()))
        known = None if is_file or is_new else read_json(out / REPORT)
    except (OSError, ValueError) as error:
        raise InputError(f"out={out}: cannot be read ({error})") from error
    if is_file:
        raise InputError(f"out={out}: is a file; must be a new folder")
    if is_new:
        return False
    found = any((out / name).is_file() for name in (CHECKPOINT, WEIGHTS))
    if not found or known is None or not isinstance(known.get("settings"), dict):
        raise InputError(
            f"out={out}: exists and does not hold a complete conversion; choose another folder"
        )
    for name, value in settings.items():
        before = known["settings"].get(name)
        if before != value:
            raise InputError(
                f"out={out}: holds another conversion ({name} was {before}, now {value});"
                " choose another folder, or remove it"
            )
    return True


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A draft folder to fill, which becomes `out` at the end; after an error nothing is left.

    Raises:
        InputError: the folder cannot be created or written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        if out.is_dir():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _full_disks_are_os_errors() -> Iterator[None]:
    """Turns the errors of torch and safetensors for a full disk into OSErrors."""
    try:
        yield
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(0, str(error).splitlines()[0]) from error


def write_checkpoint(
    folder: Path, made: TrainedModel, *, with_weights: bool, report: Mapping[str, Any]
) -> None:
    """Writes a folder that can be used as src.generate run= and src.train init=."""
    config = {
        **{
            name: without_off(name, dataclasses.asdict(getattr(made.parts, name)))
            for name in ("model", "attention", "ffn")
        },
        "kinds": kinds_of(made.parts.attention, made.parts.ffn),
        "choices": dict(made.choices),
        "recipe": {"seq_len": made.parts.seq_len},
    }
    weights: dict[str, Tensor] = made.model.state_dict() if with_weights else {}
    content = {
        "state_dict": {f"{PREFIX}{name}": value for name, value in weights.items()},
        "config": config,
        "tokenizer": made.tokenizer.state(),
        # Without the source's path, so that equal conversions give equal bytes.
        "conversion": dict(report["settings"]),
        "global_step": made.step,
    }
    (folder / CHECKPOINT).parent.mkdir(parents=True)
    with _full_disks_are_os_errors():
        torch.save(content, folder / CHECKPOINT)
    text = yaml.safe_dump(config, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    write_json(folder / REPORT, report)


def write_huggingface(folder: Path, made: TrainedModel, *, report: Mapping[str, Any]) -> None:
    """Writes a folder that transformers can load.

    Raises:
        InputError: the model has parts that Llama lacks.
    """
    config = llama_config(made.parts, end_ids=made.tokenizer.end_ids)
    tensors = weights_to_llama(made.model.state_dict(), made.parts)
    with _full_disks_are_os_errors():
        write_folder(folder, config=config, tensors=tensors, tokenizer=as_library(made.tokenizer))
    write_json(folder / REPORT, report)
