"""The loss of next-token prediction.

Axes: B batch, T time, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.transformer import Transformer
from src.training.chunked_loss import is_chunked, linear_cross_entropy


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
    if not z_loss_weight and isinstance(model, Transformer):
        weight_VD = model.head.weight
        if is_chunked(weight_VD, num_tokens=tokens_BT.numel()):
            states_SD = model.states(tokens_BT).flatten(0, 1)
            return {"loss": linear_cross_entropy(states_SD, weight_VD, targets_BT.flatten())}
    logits_BTV = model(tokens_BT)
    found = {"loss": cross_entropy(logits_BTV, targets_BT).mean()}
    if z_loss_weight:
        partition_BT = logits_BTV.float().logsumexp(dim=-1)
        found["z_loss"] = z_loss_weight * partition_BT.square().mean()
    return found
