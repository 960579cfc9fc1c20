"""What a batch is made of, in kinds that can be read again without running code from a file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def plain(batch: Any) -> Any:
    """The same with dicts for mappings of any kind and tensors for arrays; all else is left."""
    if isinstance(batch, Mapping):
        return {name: plain(value) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(plain(value) for value in batch)
    if isinstance(batch, np.generic):
        return batch.item()
    if isinstance(batch, np.ndarray):
        try:
            return torch.from_numpy(np.array(batch))
        # Of text, of objects, or of numbers that tensors have not.
        except (TypeError, ValueError):
            return batch
    return batch


def unreadable(file: Path) -> str | None:
    """What in a file that torch has saved cannot be read back safely; None: all can."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # Whatever was saved into it.
    except Exception as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        return type(error).__name__ if foreign is None else foreign[1]
    return None
