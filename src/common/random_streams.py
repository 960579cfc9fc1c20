"""Random streams: every random draw derives from (seed, purpose, index), and from nothing else."""

import hashlib
import random

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed for one purpose ("init", "data") and index (a parameter name, a step).

    A hash rather than a counter: no stream depends on how many numbers another one has drawn, so
    adding a stream changes no other, and step n can be drawn without the steps before it.
    """
    text = "/".join((str(seed), purpose, *map(str, index)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A CPU generator at the beginning of the stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *index))


def seed_global(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch.

    This project never draws from them, but a user's own model may.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
