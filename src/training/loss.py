"""The loss of next-token prediction.

Axes: B batch, T time, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Of each target in nats, (B, T), float32 whatever the precision."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        loss = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none"
        )
    return loss.view_as(targets_BT)
