"""What a public failure consists of: a model, its batches, its loss and its optimizer."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]

STEPS = 10
"""Optimizer steps of most cases."""

BAD = 6
"""The batch that fails, counted from 0: that of the seventh step."""

INF = float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that do not depend on the global random state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [0, 1) that do not depend on the global random state."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class PublicFailure(nn.Module):
    """The base of all cases. The model returns its loss, unless the case has a `loss`."""

    source: ClassVar[str]
    """Address of the public report."""
    num_inputs: ClassVar[int | None] = None
    """Tensors of a batch that the model takes, from the first; None: all."""
    num_micro_batches: ClassVar[int] = 1
    """Batches whose gradients are accumulated in one optimizer step."""
    loss: ClassVar[Callable[..., Tensor] | None] = None
    """Computes the loss from the model's output and the batch; None: the output is the loss."""

    @staticmethod
    def batches() -> Iterator[Batch]:
        """The batches in the order of training."""
        raise NotImplementedError

    @staticmethod
    def seed() -> int:
        """Sets the random numbers that are drawn during training."""
        return 0

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        """Plain SGD, at a rate that changes nothing about the failure."""
        return torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss_of(self, output: Any, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return output if self.loss is None else self.loss(output, *batch)
