"""Rotary position embedding (Su et al., arXiv 2104.09864), in Llama's half-rotation layout.

Axes: B batch, H heads, T time, R rotated dimensions of a head, K all dimensions of a head.
"""

import torch
from torch import Tensor, nn

from src.model.cache import Rope


class RotaryTable(nn.Module):
    """Cosines and sines for positions 0 .. max_seq_len - 1, shared by all layers.

    The sines of the first half are negative, because a rotation adds `-x_second * sin` there.

    Args:
        rope_dim: rotated dimensions of a head; even, because a rotation turns pairs.
        max_seq_len: the longest sequence, in tokens.
        theta: base of the geometric series of frequencies.
    """

    cos_TR: Tensor
    sin_TR: Tensor

    def __init__(self, *, rope_dim: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)
        angles_TR = torch.cat((angles, angles), dim=-1)
        # Not persistent: the tables follow from the config and need no place in checkpoints.
        self.register_buffer("cos_TR", angles_TR.cos(), persistent=False)
        sines = torch.cat((-angles.sin(), angles.sin()), dim=-1)
        self.register_buffer("sin_TR", sines, persistent=False)

    def forward(self, num_positions: int) -> Rope:
        """The tables of the first `num_positions` positions, each (T, R).

        Raises:
            ValueError: num_positions exceeds max_seq_len.
        """
        limit = self.cos_TR.shape[0]
        if num_positions > limit:
            raise ValueError(f"a sequence of {num_positions} tokens exceeds the context of {limit}")
        return self.cos_TR[:num_positions], self.sin_TR[:num_positions]

    def at(self, positions_BT: Tensor) -> Rope:
        """The tables of arbitrary positions, each (B, 1, T, R) so that all heads share them."""
        return self.cos_TR[positions_BT].unsqueeze(1), self.sin_TR[positions_BT].unsqueeze(1)


def rotate(x_BHTR: Tensor, rope: Rope) -> Tensor:
    """Rotates every head by its position, in float32; the result has the dtype of the input."""
    cos_TR, sin_TR = rope
    x = x_BHTR.float()
    rotated = torch.addcmul(x * cos_TR, x.roll(x.shape[-1] // 2, dims=-1), sin_TR)
    return rotated.to(x_BHTR.dtype)
