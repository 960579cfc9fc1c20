"""Training batches that are spoilt on purpose, to study how a run survives bad data.

Axes: B rows of a batch, T time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.data.batches import Batch

KINDS = ("none", "repeats", "shifted_labels")


@dataclass(kw_only=True)
class PoisonConfig:
    """Which training batches are spoilt, and how. Validation is never spoilt."""

    kind: str
    """none: no batch is spoilt; repeats: each row repeats its first tokens; shifted_labels: targets
    are one more token ahead, as when a loss shifts labels that were shifted before."""
    first_step: int
    """The first spoilt optimizer step, counted from 1."""
    num_steps: int
    """Spoilt steps in a row; at least 1."""
    every: int | None
    """Steps from the beginning of one spoilt stretch to that of the next; null: only one."""
    repeated_tokens: int
    """kind=repeats: tokens that a row repeats; at least 1."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind}: must be one of {', '.join(KINDS)}")
        for field in ("first_step", "num_steps", "repeated_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.every is not None and self.every <= self.num_steps:
            raise ValueError(
                f"every={self.every}: must be above num_steps={self.num_steps}, or null for once"
            )

    @property
    def is_on(self) -> bool:
        """Whether any batch can be spoilt."""
        return self.kind != "none"

    def spoils(self, step: int) -> bool:
        """Whether the batches of an optimizer step, counted from 1, are spoilt."""
        since = step - self.first_step
        if not self.is_on or since < 0:
            return False
        return (since if self.every is None else since % self.every) < self.num_steps

    def spoilt(self, batch: Batch) -> Batch:
        """A spoilt copy of a batch of inputs and targets, (B, T) int64 each."""
        inputs_BT, targets_BT = batch
        length = inputs_BT.shape[1]
        if self.kind == "shifted_labels":
            return inputs_BT, targets_BT.roll(-1, dims=1)
        times = -(-(length + 1) // self.repeated_tokens)
        row_BT = inputs_BT[:, : self.repeated_tokens].repeat(1, times)
        return row_BT[:, :length], row_BT[:, 1 : length + 1].clone()
