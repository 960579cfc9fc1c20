"""Causal attention over whole sequences, and over a cache.

Axes: B batch, H query heads, G key-value heads, T time, S slots of the cache, K dimensions of a
head, N = B * H.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from src.model.attention.capped import capped_attention, causal_mask
from src.model.bounds import SoftCap

NUM_BLOCKS = 4
"""Blocks of queries on a CPU. More blocks compute fewer masked scores, but take more calls."""

SHORTEST, LONGEST = 128, 512
"""Sequence lengths, in tokens, for which blocks are faster than PyTorch's kernel and the attention
probabilities, which are kept for the backward pass, take little memory."""


def scaled_dot_product_attention(
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    *,
    softcap: SoftCap | None = None,
) -> Tensor:
    """Causal attention: softmax(query . key / sqrt(K)) . value, (B, H, T, K).

    Equal to PyTorch's function of this name with is_causal=True, whose CPU kernel also computes
    the scores of later keys and masks them. On a CPU in float32, this function processes the
    queries in blocks, each with only the keys up to its last query, which saves a quarter to a
    third of the time.

    Args:
        query_BHTK: H is a multiple of G; consecutive query heads share a key-value head.
        key_BGTK: keys, one for each position.
        value_BGTK: values, in the shape of the keys.
        softcap: a cap on the scores; None: PyTorch's attention.
    """
    tensors = query_BHTK, key_BGTK, value_BGTK
    if has_torch_function_variadic(*tensors):
        # A TorchFunctionMode, such as the tracer's, must see this call rather than its parts.
        attended: Tensor = handle_torch_function(
            scaled_dot_product_attention, tensors, *tensors, softcap=softcap
        )
        return attended
    if softcap is not None:
        mask_TT = causal_mask(query_BHTK.shape[2], device=query_BHTK.device)
        return capped_attention(*tensors, softcap=softcap, mask=mask_TT)
    num_sharing = query_BHTK.shape[1] // key_BGTK.shape[1]
    on_cpu = query_BHTK.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    float32_on_cpu = on_cpu and query_BHTK.dtype == torch.float32
    if not float32_on_cpu or not SHORTEST <= query_BHTK.shape[2] <= LONGEST:
        return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=num_sharing > 1)
    if num_sharing > 1:
        key_BGTK, value_BGTK = (
            x.repeat_interleave(num_sharing, dim=1) for x in (key_BGTK, value_BGTK)
        )
    out_NTK: Tensor = _InBlocks.apply(
        *(x.flatten(0, 1) for x in (query_BHTK, key_BGTK, value_BGTK))
    )
    return out_NTK.unflatten(0, query_BHTK.shape[:2])


def attend_to_cache(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    *,
    mask: Tensor | None,
    softcap: SoftCap | None,
) -> Tensor:
    """As `scaled_dot_product_attention`, for new tokens T that follow cached ones.

    Args:
        query_BHTK: queries of the new tokens.
        key_BGSK: keys of all tokens so far.
        value_BGSK: values of all tokens so far.
        mask: (B, 1, T, S), True where a token is attended to; None if all are.
        softcap: a cap on the scores; None: PyTorch's attention.
    """
    if softcap is not None:
        return capped_attention(query_BHTK, key_BGSK, value_BGSK, softcap=softcap, mask=mask)
    return F.scaled_dot_product_attention(
        query_BHTK,
        key_BGSK,
        value_BGSK,
        attn_mask=mask,
        enable_gqa=key_BGSK.shape[1] < query_BHTK.shape[1],
    )


class _InBlocks(torch.autograd.Function):
    """Causal attention in blocks of queries; heads are batch entries."""

    @staticmethod
    def forward(ctx: Any, query_NTK: Tensor, key_NTK: Tensor, value_NTK: Tensor) -> Tensor:
        scale = query_NTK.shape[-1] ** -0.5
        out_NTK = torch.empty_like(query_NTK)
        probabilities = []
        for start, end in _blocks(query_NTK.shape[1]):
            later = torch.full((end - start, end), -torch.inf).triu(start + 1)
            query, key = query_NTK[:, start:end], key_NTK[:, :end]
            scores = torch.baddbmm(later, query, key.transpose(1, 2), alpha=scale)
            probabilities.append(scores.softmax(dim=-1))
            out_NTK[:, start:end] = probabilities[-1] @ value_NTK[:, :end]
        ctx.save_for_backward(query_NTK, key_NTK, value_NTK, *probabilities)
        return out_NTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_NTK, key_NTK, value_NTK, *probabilities = ctx.saved_tensors
        scale = query_NTK.shape[-1] ** -0.5
        grad_query, grad_key, grad_value = (
            torch.zeros_like(x) for x in (query_NTK, key_NTK, value_NTK)
        )
        for (start, end), p in zip(_blocks(query_NTK.shape[1]), probabilities, strict=True):
            grad, query = grad_NTK[:, start:end], query_NTK[:, start:end]
            key, value = key_NTK[:, :end], value_NTK[:, :end]
            grad_value[:, :end] += p.transpose(1, 2) @ grad
            grad_p = grad @ value.transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype) * scale
            grad_query[:, start:end] = grad_scores @ key
            grad_key[:, :end] += grad_scores.transpose(1, 2) @ query
        return grad_query, grad_key, grad_value


def _blocks(time: int) -> list[tuple[int, int]]:
    """First query and exclusive end of each block."""
    ends = [time * (number + 1) // NUM_BLOCKS for number in range(NUM_BLOCKS)]
    return list(zip([0, *ends], ends, strict=False))
