"""Random streams: everything random derives from (seed, purpose, index), and from nothing else."""

import hashlib
import random

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed for one purpose ("init", "data") and place (a name, a step)."""
    text = "/".join((str(seed), purpose, *map(str, index)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *index))


def seed_global(seed: int) -> None:
    """Sets the generators that Python, NumPy and torch have one of each.

    This project draws nothing from them; a user's own model may.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
