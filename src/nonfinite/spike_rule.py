"""When a gradient norm is a spike worth an incident, and which rows of the batch made it."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

WINDOW = 128
"""Number of last steps with which a norm is compared."""

EARLY = 5, 20.0
LATE = 64, 8.0
"""Least number of earlier finite steps, and the multiple of their median that is a spike. With
fewer steps the median says less, so that more is asked of the norm."""

SHARE = 0.5
"""The rows made the spike if the norm without them is below this share."""


class RecentNorms:
    """The gradient norms of the last steps, and whether the next one is a spike."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._least = math.inf
        """At most the smallest norm of the window; an older one may have been smaller."""

    def is_spike(self, norm: float) -> bool:
        """Whether a norm is far above those before it; then keeps it."""
        # Most norms are not even far above the smallest, so that nothing need be looked through.
        found = norm > LATE[1] * self._least and is_spike(norm, list(self._norms))
        self._norms.append(norm)
        self._least = min(self._norms) if norm > LATE[1] * self._least else min(self._least, norm)
        return found


def is_spike(norm: float, earlier: Sequence[float]) -> bool:
    """Whether a gradient norm is far above those of the steps before it."""
    recent = earlier[-WINDOW:]
    # Most norms are not even far above the smallest, so that nothing need be sorted.
    if not recent or not math.isfinite(norm) or norm <= LATE[1] * min(recent):
        return False
    known = sorted(filter(math.isfinite, recent))
    if not known:
        return False
    median = known[len(known) // 2]
    # A median of 0 is that of steps without a gradient.
    return median > 0 and any(
        len(known) >= least and norm > times * median for least, times in (EARLY, LATE)
    )


def num_rows(batch: Any) -> int | None:
    """The size of the first axis that most tensors of a batch share; None if there is none."""
    sizes = [
        leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()
    ]
    rows = max(set(sizes), key=sizes.count, default=0)
    return rows if rows > 1 else None


def with_rows(batch: Any, rows: Sequence[int], total: int) -> Any:
    """The batch with some of its rows; tensors with another first axis are left as they are."""
    return tree_map(
        lambda leaf: (
            leaf[list(rows)]
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == total
            else leaf
        ),
        batch,
    )


def guilty_row(total: int, norm_of: Callable[[Sequence[int]], float]) -> dict[str, Any] | None:
    """The row without which the spike is gone, found by halving; None if no single row made it.

    Args:
        total: number of rows.
        norm_of: the gradient norm of a step on some of the rows.
    """
    rows: Sequence[int] = range(total)
    full = norm_of(rows)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = max((rows[:half], rows[half:]), key=norm_of)
    without = norm_of([row for row in range(total) if row != rows[0]])
    if not without < SHARE * full:
        return None
    return {"row": rows[0], "norm": full, "norm_without": without}
