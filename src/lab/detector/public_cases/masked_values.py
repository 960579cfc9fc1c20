"""Infinities that are written as masks, and means over nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lab.detector.public_cases.public_failure import (
    BAD,
    INF,
    STEPS,
    Batch,
    PublicFailure,
    normal,
)


class SmoothedLabels(PublicFailure):
    """Smoothing of labels gives a share to a class that was masked with -inf: the loss is inf."""

    source = "https://github.com/facebookresearch/pytext/pull/1698"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor, blocked: Tensor) -> Tensor:
        logits = self.net(x).masked_fill(blocked, -INF)
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            blocked = torch.zeros(8, 5, dtype=torch.bool)
            blocked[2, 4] = n == BAD
            yield normal(8, 4, seed=n), torch.arange(8) % 4, blocked


class SoftTargets(PublicFailure):
    """A class that is masked with -inf has target 0: 0 times -inf."""

    source = "https://github.com/google-deepmind/optax/issues/896"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x: Tensor, target: Tensor, blocked: Tensor) -> Tensor:
        log_probs = F.log_softmax(self.net(x).masked_fill(blocked, -INF), -1)
        return -(target * log_probs).sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            blocked = torch.zeros(8, 5, dtype=torch.bool)
            blocked[2, 4] = n == BAD
            target = torch.full((8, 5), 0.25)
            target[:, 4] = 0.0
            yield normal(8, 4, seed=n), target, blocked


class HiddenMarkov(PublicFailure):
    """A state that cannot be reached: logsumexp of a column of -inf; loss finite, gradient NaN."""

    source = "https://github.com/pytorch/pytorch/issues/31829"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.moves = nn.Linear(3, 4), nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        moves = self.moves.masked_fill(~allowed, -INF)
        alpha = torch.zeros(4)
        for scores in self.net(x):
            alpha = torch.logsumexp(alpha[:, None] + moves, 0) + scores
        return torch.logsumexp(alpha, 0)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            allowed = torch.ones(4, 4, dtype=torch.bool).triu()
            if n == BAD:
                allowed[:, 2] = False
            yield normal(5, 3, seed=n), allowed


class MaskedLogSoftmax(PublicFailure):
    """log(mask) is added to the scores: -inf at every step, and at one in a whole row."""

    source = "https://github.com/allenai/allennlp/issues/890"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = F.log_softmax(self.net(x) + mask.log(), -1).exp()
        return weights.pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            mask = torch.ones(8, 6)
            mask[:, 4:] = 0.0
            if n == BAD:
                mask[3] = 0.0
            yield normal(8, 4, seed=n), mask


class NoInstance(PublicFailure):
    """The second micro-batch of a step has no object: the mean over none of its boxes."""

    source = "https://github.com/zhang-tao-whu/e2ec/issues/7"
    num_micro_batches = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, boxes: Tensor, found: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.net(x)[found], boxes[found])

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(2 * STEPS):
            found = torch.arange(8) % 2 == 0
            if n == 2 * BAD + 1:
                found = torch.zeros(8, dtype=torch.bool)
            yield normal(8, 4, seed=n), normal(8, 4, seed=n + 100), found


class PaddedNegatives(PublicFailure):
    """Scores of padding are -inf, and are divided by a learned temperature: its gradient is NaN."""

    source = "https://github.com/NVIDIA-NeMo/Automodel/pull/3850"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.1))

    def forward(self, query: Tensor, keys: Tensor, padded: Tensor) -> Tensor:
        query, keys = F.normalize(self.net(query), dim=-1), F.normalize(self.net(keys), dim=-1)
        scores = (query[:, None] * keys).sum(-1).masked_fill(padded, -INF)
        labels = torch.zeros(len(query), dtype=torch.long)
        return F.cross_entropy(scores / self.temperature, labels)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            padded = torch.zeros(8, 5, dtype=torch.bool)
            padded[2, 3:] = n == BAD
            yield normal(8, 4, seed=n), normal(8, 5, 4, seed=n + 100), padded


class StateDecay(PublicFailure):
    """A state space model: the exp of a difference of sums is infinite where a mask says 0."""

    source = "https://github.com/vllm-project/vllm/pull/37501"

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.net = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = -F.softplus(self.decay(x)).squeeze(-1).cumsum(1)
        causal = torch.ones(x.shape[1], x.shape[1]).tril()
        kernel = torch.exp(total[:, :, None] - total[:, None, :]) * causal
        return (kernel @ self.net(x)).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield (normal(4, 12, 4, seed=n) * (100.0 if n == BAD else 1.0),)
