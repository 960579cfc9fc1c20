"""Numbers so small that they become 0, or that one over them is infinite."""

from collections.abc import Iterator
from typing import Any

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


class MixtureDensity(PublicFailure):
    """A recurrent mixture of Gaussians: the densities of an outlier are all 0, as is their sum."""

    source = "https://github.com/sagelywizard/pytorch-mdn/issues/6"

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 4 * (2 + 2 + 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)
        mean, log_sigma, share = self.head(hidden).split([8, 8, 4], -1)
        mean, sigma = mean.unflatten(-1, (4, 2)), log_sigma.unflatten(-1, (4, 2)).exp()
        density = torch.exp(-0.5 * ((y[:, :, None] - mean) / sigma).pow(2)) / (2.5066 * sigma)
        likelihood = (density.prod(-1) * F.softmax(share, -1)).sum(-1)
        return -torch.log(likelihood).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            y = normal(4, 5, 2, seed=n + 100)
            if n == BAD:
                y[2, 3] = 100.0
            yield normal(4, 5, 3, seed=n), y


class SkipGram(PublicFailure):
    """log(sigmoid(x)) of a large negative score, with sparse gradients: the sigmoid is 0."""

    source = "https://github.com/udacity/deep-learning-v2-pytorch/issues/199"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8, sparse=True)
        with torch.no_grad():
            self.words.weight[9] = 5.0

    def forward(self, word: Tensor, near: Tensor, noise: Tensor) -> Tensor:
        word, near, noise = self.words(word), self.words(near), self.words(noise)
        hit = (word * near).sum(-1).sigmoid().log()
        miss = (word * noise).sum(-1).neg().sigmoid().log()
        return -(hit + miss).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            word, near, noise = torch.randint(9, (3, 8), generator=torch.Generator().manual_seed(n))
            if n == BAD:
                word[5] = noise[5] = 9
            yield word, near, noise


class RoundedThrough(torch.autograd.Function):
    """Rounds to multiples of a scale; the backward pass lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return (x * inverse).round() * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class TinyScale(PublicFailure):
    """The scale of a quantised group is 1e-42: it is not 0, and one over it is infinite."""

    source = "https://github.com/intel/auto-round/issues/622"

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.net = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * x
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        return self.net(RoundedThrough.apply(x, scale)).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(8, 4, seed=n)
            if n == BAD:
                x[4] = torch.tensor([1e-40, 0.0, 0.0, 0.0])
            yield (x,)


class SoftplusScale(PublicFailure):
    """The softplus of -120 is 0, and the predicted standard deviation divides."""

    source = "https://github.com/mllam/neural-lam/pull/537"
    num_inputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
        nn.init.constant_(self.spread.weight, 0.4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), F.softplus(self.spread(x))

    @staticmethod
    def loss(output: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        mean, sigma = output
        distance = (y - mean) / sigma
        return (0.5 * distance.pow(2) + sigma.log()).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = 0.3 * normal(8, 3, seed=n)
            if n == BAD:
                x[6] = -100.0
            yield x, normal(8, 2, seed=n + 100)


class VanishedEpsilon(PublicFailure):
    """A norm in float32, whose variance with its epsilon of 1e-12 goes to float16: padding is 0."""

    source = "https://github.com/deepspeedai/DeepSpeed/issues/581"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 2).half()

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True) + 1e-12
        normed = centred.half() * variance.half().rsqrt()
        return self.net(normed).float().pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(4, 8, seed=n)
            if n == BAD:
                x[3] = 0.0
            yield (x,)
