"""Averages over nothing, and deviations of a single row."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lab.detector.public_cases.public_failure import (
    BAD,
    STEPS,
    Batch,
    PublicFailure,
    normal,
)


class EasyTriplets(PublicFailure):
    """No triplet violates the margin: the sum over none is divided by their number, 0."""

    source = "https://github.com/KevinMusgrave/pytorch-metric-learning/issues/107"
    hardest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        anchor, positive, negative = self.net(anchor), self.net(positive), self.net(negative)
        near, far = (anchor - positive).norm(dim=-1), (anchor - negative).norm(dim=-1)
        violation = F.relu(near - far + 0.2)
        # For a log. It is the mean of nothing in most steps, and harms nobody.
        self.hardest = violation.detach()[violation > 5.0].mean()
        return violation.sum() / (violation > 0).sum()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            anchor = normal(8, 4, seed=n)
            negative = anchor + (100.0 if n == BAD else 0.1) * (
                normal(8, 4, seed=n + 200).abs() + 1
            )
            yield anchor, anchor + 0.1 * normal(8, 4, seed=n + 100), negative


class NoLabelTokens(PublicFailure):
    """All labels of both micro-batches were cut off: the summed loss is divided by their count."""

    source = "https://github.com/NVIDIA-NeMo/Automodel/issues/3796"
    num_micro_batches = 2

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor, labels: Tensor, num_labels: Tensor) -> Tensor:
        logits = self.head(self.words(ids))
        return F.cross_entropy(logits.mT, labels, reduction="sum") / num_labels

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(2 * STEPS):
            ids = torch.randint(12, (2, 6), generator=torch.Generator().manual_seed(n))
            labels = ids.roll(-1, 1)
            labels[:, : (6 if n // 2 == BAD else 3)] = -100
            yield ids, labels, torch.tensor(0 if n // 2 == BAD else 12)


class OneSample(PublicFailure):
    """A batch normalisation written by hand, whose last batch has one row: its variance is 0/0."""

    source = "https://github.com/karpathy/makemore/issues/22"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.net(x)
        spread = hidden.var(0, keepdim=True)
        normed = (hidden - hidden.mean(0, keepdim=True)) / torch.sqrt(spread + 1e-5)
        return F.cross_entropy(self.head(torch.tanh(normed)), y)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            rows = 1 if n == BAD else 8
            yield normal(rows, 4, seed=n), torch.arange(rows) % 3
