"""The loss of a large vocabulary, without ever holding all its logits.

Axes: S tokens of all rows, C tokens of one chunk, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from nonfinite.rerun import is_watched

CHUNKED_VOCAB = 16384
"""Tokens of a vocabulary from which on a training step never has all its logits at once."""

CHUNK = 256
"""Targets of which they are there: with fewer the products of a CPU become slow."""


def saves_memory(*, vocab_size: int, hidden_dim: int, num_tokens: int) -> bool:
    """Whether the head's gradient, made at once, is smaller than the logits of many words."""
    return vocab_size >= CHUNKED_VOCAB and num_tokens >= hidden_dim


def is_chunked(weight_VD: Tensor, *, num_tokens: int) -> bool:
    """Whether a training step does it: where it saves memory, and nobody wants to see all logits.

    A compiled step cannot hold it, and fuses the logits with what is done to them anyway.
    """
    vocab_size, hidden_dim = weight_VD.shape
    saves = saves_memory(vocab_size=vocab_size, hidden_dim=hidden_dim, num_tokens=num_tokens)
    enough = saves and not is_watched()
    return enough and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear_cross_entropy(states_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """Mean cross-entropy of the logits states @ weight.T, in nats, float32.

    Products have autocast's type where that is on; softmax, loss and the sums over chunks are
    float32 whatever the precision. Its gradients are made in the forward pass, chunk by chunk.
    """
    given = states_SD, weight_VD, targets_S
    if has_torch_function_variadic(*given):
        # So that who watches functions sees this one, and not its inside.
        loss: Tensor = handle_torch_function(linear_cross_entropy, given, *given)
        return loss
    device = states_SD.device.type
    dtype = states_SD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        mean: Tensor = _LinearCrossEntropy.apply(*given, dtype)
    return mean


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_SD: Tensor, weight_VD: Tensor, targets_S: Tensor, dtype: torch.dtype
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        total = torch.zeros((), device=states_SD.device)
        grad_states_SD = torch.empty_like(states_SD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(states_SD), CHUNK):
            rows = slice(start, start + CHUNK)
            states_CD, targets_C1 = states_SD[rows].to(dtype), targets_S[rows, None]
            logits_CV = (states_CD @ weight.T).float()
            partition_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            total += (partition_C1 - logits_CV.gather(-1, targets_C1)).sum()
            # softmax - one_hot, in the place of the logits; each row has one target.
            grad_CV = logits_CV.sub_(partition_C1).exp_()
            grad_CV.scatter_add_(-1, targets_C1, -torch.ones_like(partition_C1))
            grad_CV = grad_CV.div_(len(states_SD)).to(dtype)
            grad_states_SD[rows] = grad_CV @ weight
            grad_weight_VD += grad_CV.T @ states_CD
        ctx.save_for_backward(grad_states_SD, grad_weight_VD.to(weight_VD.dtype))
        return total / len(states_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states_SD, grad_weight_VD = ctx.saved_tensors
        return grad_states_SD * grad, grad_weight_VD * grad, None, None
