"""Writes a converted model: whole, or not at all."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from src.conversion.huggingface import write_folder
from src.conversion.llama import llama_config, weights_to_llama
from src.conversion.vocabulary import as_library
from src.errors import InputError
from src.model.kinds import kinds_of
from src.restore import PREFIX
from src.tracking.folder import RunFolder, read_json, write_json
from src.trained import TrainedModel

REPORT = "conversion.json"


def written_already(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very conversion.

    Args:
        out: where it is to be.
        settings: all that it hangs on.

    Raises:
        InputError: it holds something else, or nothing can be written there.
    """
    try:
        if not out.exists():
            return False
        if not out.is_dir():
            raise InputError(f"out={out}: is a file; must be a folder that is not there yet")
        known = read_json(out / REPORT)
        if known is None and not any(out.iterdir()):
            return False
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"out={out}: cannot be read ({error})") from error
    if known is None or "settings" not in known:
        raise InputError(f"out={out}: is there already, and holds no conversion; choose another")
    for name, value in settings.items():
        before = known["settings"].get(name)
        if before != value:
            raise InputError(
                f"out={out}: holds another conversion ({name} was {before}, now {value});"
                " choose another, or remove it"
            )
    return True


def write_checkpoint(
    out: Path,
    made: TrainedModel,
    *,
    with_weights: bool,
    report: Mapping[str, Any],
) -> None:
    """A folder that src.generate takes as run= and src.train as init=."""
    config = {
        "model": dataclasses.asdict(made.parts.model),
        "attention": dataclasses.asdict(made.parts.attention),
        "ffn": dataclasses.asdict(made.parts.ffn),
        "kinds": kinds_of(made.parts.attention, made.parts.ffn),
        "choices": dict(made.choices),
        "recipe": {"seq_len": made.parts.seq_len},
    }
    weights: dict[str, Tensor] = made.model.state_dict() if with_weights else {}
    content = {
        "state_dict": {f"{PREFIX}{name}": value for name, value in weights.items()},
        "config": config,
        "tokenizer": made.tokenizer.state(),
        # Without the place of the source: the same weights have the same bytes.
        "conversion": dict(report["settings"]),
        "global_step": made.step,
    }

    def fill(folder: Path) -> None:
        last = RunFolder(folder).last
        last.parent.mkdir()
        torch.save(content, last)
        text = yaml.safe_dump(config, sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        write_json(folder / REPORT, report)

    _whole(out, fill)


def write_huggingface(out: Path, made: TrainedModel, *, report: Mapping[str, Any]) -> None:
    """A folder that transformers loads.

    Raises:
        InputError: no Llama has these parts.
    """
    config = llama_config(made.parts, end_ids=made.tokenizer.end_ids)
    tensors = weights_to_llama(made.model.state_dict(), made.parts)

    def fill(folder: Path) -> None:
        tokenizer = as_library(made.tokenizer)
        write_folder(folder, config=config, tensors=tensors, tokenizer=tokenizer)
        write_json(folder / REPORT, report)

    _whole(out, fill)


def _whole(out: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside the target and renames it; what goes wrong leaves nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    try:
        fill(draft)
        draft.chmod(0o777 & ~_umask())
        if out.is_dir():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    """The process's own, which can be read by setting it alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
