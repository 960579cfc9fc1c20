"""Bounds on values that pass through a model, and what they have bound.

Axes: any; both bounds work on single numbers.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def check_bound(field: str, value: float | None, *, below: float = math.inf) -> None:
    """Raises ValueError unless `value` is None or above 0 and below `below`."""
    if value is not None and not 0 < value < below:
        limit = "finite" if below == math.inf else f"below {below}"
        raise ValueError(f"{field}={value}: must be above 0 and {limit}, or null")


class MeasuredPart(nn.Module, ABC):
    """A part that keeps statistics of what it did in training, until `reset_stats`.

    They are buffers that no checkpoint holds. Only training fills them: validation and decoding
    neither pay for them nor change them.
    """

    @abstractmethod
    def stats(self) -> dict[str, Tensor]:
        """Statistics of training since the last reset, by name."""

    def reset_stats(self) -> None:
        """Forgets what has been seen."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()


class SoftCap(MeasuredPart):
    """`x -> cap * tanh(x / cap)` (Gemma 2, arXiv 2408.00118, section 2): bounded, and smooth.

    Computed in float32 at any precision, because near the cap bfloat16 has steps of 0.25. The
    result has the dtype of the input.
    """

    peak: Tensor

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.register_buffer("peak", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Caps `x`.

        Args:
            x: values of any shape.
            seen: True where a value has an effect; the statistics leave out the others.
        """
        values = x.float()
        if self.training:
            with torch.no_grad():
                sizes = values.detach().abs()
                sizes = sizes if seen is None else sizes.masked_fill(~seen, 0.0)
                self.peak.copy_(torch.maximum(self.peak, sizes.amax()))
        return (self.cap * torch.tanh(values / self.cap)).to(x.dtype)

    def stats(self) -> dict[str, Tensor]:
        """peak: the largest size of a value before the cap; cut: what the cap took from it."""
        capped = self.cap * torch.tanh(self.peak / self.cap)
        return {"peak": self.peak.clone(), "cut": self.peak - capped}
