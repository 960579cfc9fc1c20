"""The state of the generators that Python and NumPy have one of each."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np


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
