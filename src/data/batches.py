"""Batches as a pure function of (seed, step, rank), and validation windows in order.

Axes: B rows of one process's share of a batch, T time.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from src.common.random_streams import stream_seed
from src.data.poison import PoisonConfig

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, (B, T) int64 each; targets are the inputs shifted by one token."""


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    rows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    window_BT1 = torch.from_numpy(rows)
    # The clone keeps a model that writes into its input from changing the targets.
    return window_BT1[:, :-1], window_BT1[:, 1:].clone()


class TrainBatches:
    """Windows at uniformly random positions of the training part, drawn with replacement.

    Args:
        tokens: token ids of the training part, (number of tokens,).
        seed: the run's seed; all arms with one seed see the same batches in the same order.
        batch_size: rows of a micro-batch, over all processes.
        seq_len: tokens of a row.
        first: called when iteration starts; returns the index of the first micro-batch.
        accumulate: micro-batches of an optimizer step.
        poison: spoils the batches of some optimizer steps; None: spoils none.
        rank, world_size: index of this process, and number of processes that share a step.

    Raises:
        ValueError: batch_size is not a multiple of world_size.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        seq_len: int,
        first: Callable[[], int] = lambda: 0,
        accumulate: int = 1,
        poison: PoisonConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of {world_size}")
        self.tokens, self.seed = tokens, seed
        self.batch_size, self.seq_len, self.first = batch_size, seq_len, first
        self.accumulate, self.poison = accumulate, poison
        share = batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`, which does not depend on any earlier one."""
        draw = np.random.default_rng(stream_seed(self.seed, "data", index))
        num_starts = len(self.tokens) - self.seq_len
        # Each rank draws all rows and keeps its share: rows do not depend on the number of ranks.
        starts = draw.integers(num_starts, size=self.batch_size)
        batch = _windows(self.tokens, starts[self._mine], self.seq_len)
        if self.poison is None or not self.poison.spoils(index // self.accumulate + 1):
            return batch
        return self.poison.spoilt(batch)

    def __iter__(self) -> Iterator[Batch]:
        index = self.first()
        while True:
            yield self.batch(index)
            index += 1


class ValBatches:
    """Adjacent windows over the validation part; with `max_windows`, an evenly spaced subset."""

    def __init__(
        self, tokens: np.ndarray, *, batch_size: int, seq_len: int, max_windows: int | None
    ) -> None:
        starts = np.arange(0, len(tokens) - seq_len, seq_len)
        if max_windows is not None and max_windows < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, max_windows).round().astype(np.int64)]
        self.tokens, self.starts = tokens, starts
        self.batch_size, self.seq_len = batch_size, seq_len

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self.starts), self.batch_size):
            yield _windows(self.tokens, self.starts[begin : begin + self.batch_size], self.seq_len)
