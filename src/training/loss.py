"""The loss of next-token prediction; for a large vocabulary, without holding all logits at once.

Axes: B batch, T time, S = B * T, C tokens of one chunk, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from nonfinite.rerun import is_watched
from src.model.transformer import Transformer, run_block

Losses = Callable[..., dict[str, Tensor]]

CHUNKED_VOCAB = 16384
"""Vocabulary size from which a training step computes the loss in chunks."""

CHUNK = 256
"""Targets in a chunk; smaller chunks make matrix products slow on a CPU."""


def saves_memory(*, vocab_size: int, hidden_dim: int, num_tokens: int) -> bool:
    """Whether chunks save memory: they hold the head's gradient early instead of all logits."""
    return vocab_size >= CHUNKED_VOCAB and num_tokens >= hidden_dim


def uses_chunks(weight_VD: Tensor, *, num_tokens: int) -> bool:
    """Whether a training step computes the loss in chunks.

    It does so if that saves memory, unless the tracer watches and needs to see all logits, or the
    step is compiled: compiled code fuses the logits with the loss.
    """
    vocab_size, hidden_dim = weight_VD.shape
    saves = saves_memory(vocab_size=vocab_size, hidden_dim=hidden_dim, num_tokens=num_tokens)
    is_useful = saves and not is_watched()
    return is_useful and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear_cross_entropy(states_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """Mean cross-entropy of the logits states @ weight.T, in nats, float32.

    Matrix products follow autocast; softmax, loss and sums over chunks are float32 at any
    precision. The forward pass computes the gradients too, chunk by chunk, so that no chunk's
    logits are needed afterwards.
    """
    tensors = states_SD, weight_VD, targets_S
    if has_torch_function_variadic(*tensors):
        # A TorchFunctionMode, such as the tracer's, must see this call rather than its parts.
        loss: Tensor = handle_torch_function(linear_cross_entropy, tensors, *tensors)
        return loss
    device = states_SD.device.type
    dtype = states_SD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        mean: Tensor = _LinearCrossEntropy.apply(*tensors, dtype)
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
            # The gradient is softmax - one_hot; it overwrites the logits.
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


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, (B, T), float32 at any precision."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        loss = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none"
        )
    return loss.view_as(targets_BT)


def losses(
    model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, *, z_loss_weight: float
) -> dict[str, Tensor]:
    """The mean cross-entropy, and the z-loss (arXiv 2204.02311) if its weight is not 0."""
    # The chunks compute logits from the head's weight, without its soft-cap.
    if not z_loss_weight and isinstance(model, Transformer) and model.softcap is None:
        weight_VD = model.head.weight
        if uses_chunks(weight_VD, num_tokens=tokens_BT.numel()):
            states_SD = model.states(tokens_BT).flatten(0, 1)
            return {"loss": linear_cross_entropy(states_SD, weight_VD, targets_BT.flatten())}
    return _losses_of_logits(model(tokens_BT), targets_BT, z_loss_weight=z_loss_weight)


def compiled_losses(model: nn.Module) -> Losses:
    """`losses` of a model, as code that torch.compile compiles at its first call.

    The blocks of a Transformer share the code of one, so that compiling takes as long as for one
    layer. Steps take a few per cent longer than with all layers in one piece. The loss is not
    computed in chunks. Another model is compiled as a whole.
    """
    if type(model) is not Transformer:
        return torch.compile(losses, dynamic=False)
    # By itself the compiler takes a layer with a hook for one without.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    compiled_block = torch.compile(run_block, dynamic=False)
    of_states = torch.compile(_losses_of_states, dynamic=False)

    def compiled(
        model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, *, z_loss_weight: float
    ) -> dict[str, Tensor]:
        assert isinstance(model, Transformer)
        states_BTD = model.states(tokens_BT, compiled_block)
        return of_states(model, states_BTD, targets_BT, z_loss_weight=z_loss_weight)

    return compiled


def _losses_of_states(
    model: Transformer, states_BTD: Tensor, targets_BT: Tensor, *, z_loss_weight: float
) -> dict[str, Tensor]:
    return _losses_of_logits(model.logits(states_BTD), targets_BT, z_loss_weight=z_loss_weight)


def _losses_of_logits(
    logits_BTV: Tensor, targets_BT: Tensor, *, z_loss_weight: float
) -> dict[str, Tensor]:
    found = {"loss": cross_entropy(logits_BTV, targets_BT).mean()}
    if z_loss_weight:
        partition_BT = logits_BTV.float().logsumexp(dim=-1)
        found["z_loss"] = z_loss_weight * partition_BT.square().mean()
    return found
