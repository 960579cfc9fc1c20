"""The routed experts, and two ways to dispatch tokens to them.

Axes: S tokens of a batch, D hidden, I inner, E experts, K experts picked for a token,
N = S * K token-expert pairs sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.model.ffn.grouped import grouped_product
from src.model.ffn.swiglu import SwiGLUClamp, swiglu


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights.

    Both dispatch paths compute the same sums. `loop` visits one expert after the other and is the
    reference; `grouped` sorts token-expert pairs by expert and multiplies all groups in one call,
    without a host sync.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_dim: int,
        inner_dim: int,
        dispatch: str,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self.clamp = None if limit is None else SwiGLUClamp(limit)
        self.num_experts, self.dispatch = num_experts, dispatch
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, inner_dim))

    def forward(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        """The weighted sum of the picked experts' outputs, (S, D) in the dtype of the weights."""
        if self.dispatch == "loop":
            return self._loop(x_SD, weights_SK, picked_SK)
        # For a single token, sorting its experts takes longer than computing them.
        if len(x_SD) == 1 and x_SD.device.type == "cpu" and not torch.is_grad_enabled():
            return self._single(x_SD, weights_SK, picked_SK)
        return self._grouped(x_SD, weights_SK, picked_SK)

    def _single(self, x_1D: Tensor, weights_1K: Tensor, picked_1K: Tensor) -> Tensor:
        outs = [self._expert(number, x_1D) for number in picked_1K[0].tolist()]
        # Not a matrix product, which autocast would round to bfloat16.
        return (torch.cat(outs) * weights_1K.T).sum(dim=0, keepdim=True)

    def _expert(self, number: int, x_SD: Tensor) -> Tensor:
        gate = F.linear(x_SD, self.gate_proj[number])
        up = F.linear(x_SD, self.up_proj[number])
        return F.linear(swiglu(gate, up, self.clamp), self.down_proj[number])

    def _loop(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        y_SD = x_SD.new_zeros(x_SD.shape, dtype=weights_SK.dtype)
        for expert in range(self.num_experts):
            token, slot = (picked_SK == expert).nonzero(as_tuple=True)
            out = self._expert(expert, x_SD[token])
            y_SD = y_SD.index_add(0, token, out * weights_SK[token, slot, None])
        return y_SD

    def _grouped(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        num_tokens, top_k = picked_SK.shape
        expert_N, order_N = picked_SK.flatten().sort(stable=True)
        experts_E = torch.arange(self.num_experts, device=expert_N.device)
        ends_E = torch.searchsorted(expert_N, experts_E, right=True).to(torch.int32)
        # grouped_product ignores autocast, so the cast is explicit.
        device = x_SD.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SD.dtype
        )
        place_N = order_N.argsort()
        x_ND = _Rows.apply(x_SD.to(dtype), order_N, place_N, top_k)
        gate_NI = grouped_product(x_ND, self.gate_proj.to(dtype), ends_E)
        up_NI = grouped_product(x_ND, self.up_proj.to(dtype), ends_E)
        inner_NI = swiglu(gate_NI, up_NI, self.clamp)
        out_ND = grouped_product(inner_NI, self.down_proj.to(dtype), ends_E)
        out_SKD = _Rows.apply(out_ND, place_N, order_N, 1).view(num_tokens, top_k, -1)
        return (out_SKD * weights_SK.unsqueeze(-1)).sum(dim=1)


class _Rows(torch.autograd.Function):
    """Rows in a new order, each repeated `copies` times.

    The backward pass applies the inverse order and sums over copies. Unlike the scatter-add of
    indexing it is deterministic on every device, and it is faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(dim=1)
        return grad, None, None, None
