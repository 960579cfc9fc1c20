"""Adds to any gate the method `router_stats()`, by which instruments read a router.

Axes: S tokens of a batch, E experts, K experts picked for a token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

Read = Callable[[Any], tuple[Tensor, Tensor]]


class _LastPass:
    """A gate's logits and picked experts in its last forward pass in training."""

    def __init__(self, num_experts: int, read: Read) -> None:
        self.num_experts, self.read = num_experts, read
        self.logits_SE: Tensor | None = None
        self.picked_SK: Tensor | None = None

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that keeps the gate's output."""
        if module.training:
            logits_SE, picked_SK = self.read(output)
            self.logits_SE, self.picked_SK = logits_SE.detach(), picked_SK


def expose_router(gate: nn.Module, *, num_experts: int, read: Read, sigmoid: bool = False) -> None:
    """Adds a method `router_stats()` to a gate, and a hook that keeps its last output.

    Args:
        gate: the module that scores the experts, called once per batch.
        num_experts: number of experts that it chooses from.
        read: extracts logits (S, E) and indices of picked experts (S, K) from the gate's output.
        sigmoid: whether scores are sigmoids, whose sum can underflow to 0; else softmax.
    """
    last = _LastPass(num_experts, read)
    gate.register_forward_hook(last.keep)
    cast(Any, gate).router_stats = partial(_stats, last, sigmoid)


@torch.no_grad()
def _stats(last: _LastPass, sigmoid: bool) -> dict[str, float]:
    if last.logits_SE is None or last.picked_SK is None:
        return {}
    counts_E = torch.bincount(last.picked_SK.flatten(), minlength=last.num_experts).float()
    num_tokens, top_k = last.picked_SK.shape
    mean = num_tokens * top_k / last.num_experts
    stats = {
        "max_violation": counts_E.max() / mean - 1,
        "load_min": counts_E.min() / num_tokens,
        "load_max": counts_E.max() / num_tokens,
        "dead_experts": (counts_E == 0).sum(),
        "logit_absmax": last.logits_SE.abs().max(),
    }
    if sigmoid:
        picked_SK = last.logits_SE.float().gather(-1, last.picked_SK)
        sums_S = picked_SK.sigmoid().sum(dim=-1)
        stats["topk_sum_min"], stats["picked_logit_min"] = sums_S.min(), picked_SK.min()
        stats["num_zero_sums"] = (sums_S == 0).sum()
        stats["num_tokens"], stats["top_k"] = torch.tensor(num_tokens), torch.tensor(top_k)
    names, values = list(stats), torch.stack([v.float().cpu() for v in stats.values()])
    return dict(zip(names, values.tolist(), strict=True))
