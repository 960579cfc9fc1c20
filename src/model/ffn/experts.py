"""The routed experts and two ways to send tokens through them.

Axes: S tokens of a batch, D hidden, I inner, E experts, K experts picked for a token,
N = S * K token-expert pairs sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 8
"""Entries of the narrowest dtype, bfloat16, in 16 bytes."""


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights.

    Both dispatch paths give the same sums: `loop` visits expert after expert and is the reference;
    `grouped` sorts the pairs by expert and multiplies all groups in one call without a host sync.
    """

    def __init__(self, *, num_experts: int, hidden_dim: int, inner_dim: int, dispatch: str) -> None:
        super().__init__()
        self.num_experts, self.dispatch = num_experts, dispatch
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_dim, hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, inner_dim))

    def forward(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        """The weighted sum of the picked experts' outputs, (S, D) in the dtype of the weights."""
        dispatch = self._loop if self.dispatch == "loop" else self._grouped
        return dispatch(x_SD, weights_SK, picked_SK)

    def _loop(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        y_SD = x_SD.new_zeros(x_SD.shape, dtype=weights_SK.dtype)
        for expert in range(self.num_experts):
            token, slot = (picked_SK == expert).nonzero(as_tuple=True)
            rows = x_SD[token]
            inner = F.silu(F.linear(rows, self.gate_proj[expert]))
            inner = inner * F.linear(rows, self.up_proj[expert])
            out = F.linear(inner, self.down_proj[expert])
            y_SD = y_SD.index_add(0, token, out * weights_SK[token, slot, None])
        return y_SD

    def _grouped(self, x_SD: Tensor, weights_SK: Tensor, picked_SK: Tensor) -> Tensor:
        num_tokens, top_k = picked_SK.shape
        expert_N, order_N = picked_SK.flatten().sort(stable=True)
        experts_E = torch.arange(self.num_experts, device=expert_N.device)
        ends_E = torch.searchsorted(expert_N, experts_E, right=True).to(torch.int32)
        # grouped_mm does not follow autocast, so the cast is written out.
        device = x_SD.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SD.dtype
        )

        def product(rows: Tensor, weight_EOI: Tensor) -> Tensor:
            outputs, inputs = weight_EOI.shape[1:]
            # Zeros up to whole 16 bytes, which the kernel's strides must be; they add nothing.
            more_inputs, more_outputs = -inputs % ALIGNMENT, -outputs % ALIGNMENT
            weight_EOI = weight_EOI.to(dtype)
            if more_inputs or more_outputs:
                rows = F.pad(rows, (0, more_inputs))
                weight_EOI = F.pad(weight_EOI, (0, more_inputs, 0, more_outputs))
            out = F.grouped_mm(rows, weight_EOI.transpose(1, 2), offs=ends_E)
            return out[:, :outputs]

        x_ND = x_SD.to(dtype)[order_N // top_k]
        inner_NI = F.silu(product(x_ND, self.gate_proj)) * product(x_ND, self.up_proj)
        out_ND = product(inner_NI, self.down_proj)
        # Back to token order by the inverse permutation and a sum over K: deterministic on every
        # device, which index_add_ with repeated rows is not.
        out_SKD = out_ND[order_N.argsort()].view(num_tokens, top_k, -1)
        return (out_SKD * weights_SK.unsqueeze(-1)).sum(dim=1)
