"""Random streams: everything random derives from (seed, purpose, index), and from nothing else."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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

    Nothing of ours draws from them; a model of somebody else's may.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, those generators begin at a seed; afterwards they are where they were."""
    host = host_states()
    with torch.random.fork_rng(devices=[]):
        seed_global(seed)
        try:
            yield
        finally:
            set_host_states(host)


def host_states() -> dict[str, Any]:
    """States of Python's and NumPy's one generator, as plain values that a file may hold."""
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    version, numbers, gauss = random.getstate()
    return {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest]}


def set_host_states(states: Mapping[str, Any]) -> None:
    """Puts both generators where they were."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
