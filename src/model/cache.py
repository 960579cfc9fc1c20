"""The cache of decoding, and the positions of the next tokens.

Axes: B batch, G heads of a kept tensor, S slots, T new tokens, K dimensions of a kept head,
R rotated dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""Cosines and sines."""


class Cache:
    """The cache of one decoding run, allocated once: for each layer, tensors of (B, G, S, K).

    Sequences of unequal length are padded on the left: no other token attends to the first
    `num_padding_B` slots of a row.

    Args:
        shapes: heads and dimensions of each tensor that a layer keeps, by name.
        num_layers: layers of the model.
        num_slots: capacity in tokens, including padding.
        num_padding_B: number of padding tokens in each row.
        rotary: returns cosines and sines for positions (B, S).
        dtype: dtype of the model's weights.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        num_layers: int,
        num_slots: int,
        num_padding_B: Tensor,
        rotary: Callable[[Tensor], Rope],
        dtype: torch.dtype,
    ) -> None:
        batch, device = len(num_padding_B), num_padding_B.device
        self.num_slots, self.num_padding_B = num_slots, num_padding_B
        self.has_padding = bool(num_padding_B.any())
        slots_S = torch.arange(num_slots, device=device)
        self._rope = rotary((slots_S - num_padding_B[:, None]).clamp(min=0))
        self.length = 0
        self.layers = [
            {
                name: torch.zeros(batch, heads, num_slots, dim, dtype=dtype, device=device)
                for name, (heads, dim) in shapes.items()
            }
            for _ in range(num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all cached tensors."""
        return sum(kept.nbytes for layer in self.layers for kept in layer.values())

    def span(self, num_tokens: int) -> "Span":
        """The slots of the next tokens; the caller sets `length` once all layers have kept them.

        Raises:
            ValueError: the cache has too few free slots.
        """
        start, end = self.length, self.length + num_tokens
        if end > self.num_slots:
            raise ValueError(f"{end} tokens exceed the cache's {self.num_slots}")
        cos, sin = self._rope
        return Span(
            start=start,
            end=end,
            rope=(cos[:, :, start:end], sin[:, :, start:end]),
            rope_before=(cos[:, :, :end], sin[:, :, :end]),
            mask=self._mask(start, end),
        )

    def _mask(self, start: int, end: int) -> Tensor | None:
        """True where a token in slots start .. end - 1 attends to a slot, (B, 1, T, end).

        None if every token attends to every slot. A padding token attends to itself, because the
        softmax of a row without any slot would be NaN.
        """
        if end - start == 1 and not self.has_padding:
            return None
        slots_S = torch.arange(end, device=self.num_padding_B.device)
        own_T1 = slots_S[start:, None]
        seen_BTS = (slots_S <= own_T1) & (slots_S >= self.num_padding_B[:, None, None])
        return (seen_BTS | (slots_S == own_T1)).unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Span:
    """The new tokens of one decoding step: their slots, rotations and mask."""

    start: int
    end: int
    rope: Rope
    """Cosines and sines of the new tokens, (B, 1, T, R) each."""
    rope_before: Rope
    """Cosines and sines of all tokens up to the last new one, (B, 1, end, R) each."""
    mask: Tensor | None
    """(B, 1, T, end), True where a token is attended to; None if all are."""

    def keep(self, kept_BGSK: Tensor, new_BGTK: Tensor) -> Tensor:
        """Stores the new tokens' entries; returns all entries so far, (B, G, end, K)."""
        kept_BGSK[:, :, self.start : self.end] = new_BGTK
        return kept_BGSK[:, :, : self.end]
