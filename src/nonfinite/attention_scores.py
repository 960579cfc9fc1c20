"""Attention scores, computed beside torch's fused attention, which does not return them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CORNER = 64
"""Positions of a row whose attention is measured."""


def is_attention(func: Any) -> bool:
    """Whether a function is PyTorch's attention, or a replacement with the same name."""
    name: str = functional.scaled_dot_product_attention.__name__
    return getattr(func, "__name__", None) == name


def corner_scores(
    query: Tensor, key: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
) -> Tensor | None:
    """Causal attention scores of the first row and the first 64 positions, in float32.

    Args:
        query, key: (batch, heads, time, head).
        args, kwargs: further arguments of scaled_dot_product_attention, which are ignored.
        scale: factor on the scores; None: 1 / sqrt(head).

    Returns:
        Scores (1, heads, time, time), -inf at later positions; None for tensors with other axes.
    """
    if query.dim() != 4 or query.is_nested:
        return None
    q, k = (t[:1, :, :CORNER].detach().float() for t in (query, key))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf)
