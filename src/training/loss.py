"""The loss of next-token prediction.

Axes: B batch, T time, D hidden, V vocabulary, S tokens of all rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions

from src.model.transformer import Transformer

CHUNKED_VOCAB = 16384
"""Tokens of a vocabulary from which on a training step never has all its logits at once."""

CHUNK = 256
"""Targets of which they are there: with fewer the products of a CPU become slow."""


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Of each target in nats, (B, T), float32 whatever the precision."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        loss = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none"
        )
    return loss.view_as(targets_BT)


def losses(
    model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, *, z_loss_weight: float
) -> dict[str, Tensor]:
    """The mean cross-entropy, and the z-loss where it has a weight (arXiv 2204.02311)."""
    if not z_loss_weight and isinstance(model, Transformer) and _is_chunked(model, tokens_BT):
        return {"loss": chunked_cross_entropy(model.states(tokens_BT), model.head, targets_BT)}
    logits_BTV = model(tokens_BT)
    found = {"loss": cross_entropy(logits_BTV, targets_BT).mean()}
    if z_loss_weight:
        partition_BT = logits_BTV.float().logsumexp(dim=-1)
        found["z_loss"] = z_loss_weight * partition_BT.square().mean()
    return found


def _is_chunked(model: Transformer, tokens_BT: Tensor) -> bool:
    """Whether it saves memory: the head's gradient, made at once, is smaller than the logits.

    A compiled step cannot hold it, and fuses the logits with what is done to them anyway.
    """
    vocab_size, hidden_dim = model.head.weight.shape
    enough = vocab_size >= CHUNKED_VOCAB and tokens_BT.numel() >= hidden_dim
    return enough and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def chunked_cross_entropy(states_BTD: Tensor, head: nn.Linear, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of what the head makes of the states, without ever holding all logits.

    Sums are float32 whatever the precision; under autocast the products have its type, as the
    head's would.
    """
    states_SD, weight_VD = states_BTD.flatten(0, 1), head.weight
    device = states_SD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states_SD, weight_VD = states_SD.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        return F.linear_cross_entropy(
            states_SD,
            weight_VD,
            targets_BT.flatten(),
            options=LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None),
        ).float()
