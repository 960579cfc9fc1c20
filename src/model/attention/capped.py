"""Attention with capped scores, which PyTorch's fused kernels cannot compute.

Axes: B batch, H query heads, G key-value heads, T queries, S keys, K dimensions of a head.
"""

import torch
from torch import Tensor

from src.model.bounds import SoftCap


def capped_attention(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    *,
    softcap: SoftCap,
    mask: Tensor | None,
) -> Tensor:
    """softmax(softcap(query . key / sqrt(K)) where the mask is True) . value, (B, H, T, K).

    The cap comes before the mask, so that a hidden key stays hidden. Scores and probabilities are
    float32 at any precision, as within a fused kernel.

    Args:
        query_BHTK: H is a multiple of G; consecutive query heads share a key-value head.
        key_BGSK: keys, one for each position.
        value_BGSK: values, in the shape of the keys.
        softcap: the cap on the scores.
        mask: True where a query attends to a key, (..., T, S); None: everywhere.
    """
    num_sharing = query_BHTK.shape[1] // key_BGSK.shape[1]
    if num_sharing > 1:
        key_BGSK, value_BGSK = (
            x.repeat_interleave(num_sharing, dim=1) for x in (key_BGSK, value_BGSK)
        )
    with torch.autocast(query_BHTK.device.type, enabled=False):
        scale = query_BHTK.shape[-1] ** -0.5
        scores_BHTS = query_BHTK.float() @ key_BGSK.float().transpose(2, 3) * scale
        scores_BHTS = softcap(scores_BHTS, mask)
        if mask is not None:
            # Not -inf, which a search for the first non-finite number would find here.
            scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(torch.float32).min)
        return scores_BHTS.softmax(dim=-1).to(value_BGSK.dtype) @ value_BGSK


def causal_mask(time: int, *, device: torch.device) -> Tensor:
    """True where a query attends to a key of a whole sequence, (T, T)."""
    return torch.ones(time, time, dtype=torch.bool, device=device).tril()
