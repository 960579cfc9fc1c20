"""A divisor that is 0, or that underflows to 0."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from src.lab.detector.public_cases.public_failure import (
    BAD,
    STEPS,
    Batch,
    PublicFailure,
    normal,
    uniform,
)


class IsolatedNode(PublicFailure):
    """A node without edges: its degree 0 to the power of -0.5 is infinite, times 0 NaN."""

    source = "https://github.com/mlx-graphs/mlx-graphs/pull/18"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        degree = edges.sum(1)
        scale = degree.pow(-0.5)
        normed = scale[:, None] * edges * scale[None, :]
        return self.outer(F.relu(normed @ self.inner(x))).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            edges = torch.ones(6, 6)
            if n == BAD:
                edges[4, :] = edges[:, 4] = 0.0
            yield normal(6, 4, seed=n), edges


class MinSnr(PublicFailure):
    """A noise schedule that ends in pure noise: the signal-to-noise ratio 0 divides."""

    source = "https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/issues/2"
    signal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("signal", torch.linspace(0.99, 0.0, 10))

    def forward(self, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal = self.signal[time][:, None]
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        snr = signal / (1 - signal)
        weight = snr.clamp(max=5.0) / snr
        return (weight * (self.net(noisy) - noise).pow(2)).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            time = torch.arange(8)
            if n == BAD:
                time[5] = 9
            yield normal(8, 4, seed=n), normal(8, 4, seed=n + 100), time


class UnitGradient(torch.autograd.Function):
    """The identity, whose backward pass normalises the gradient of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm(dim=-1, keepdim=True) + 1e-8)


class NormedGradients(PublicFailure):
    """Normed gradients in float16, where 1e-8 is 0; a row of weight 0 has no gradient: 0/0."""

    source = "https://github.com/cloneofsimo/vqgan-training/issues/3"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4).half()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        hidden = UnitGradient.apply(self.net(x.half()))
        return (weight * hidden.float().pow(2).mean(-1)).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            weight = torch.ones(8)
            weight[2] = n != BAD
            yield normal(8, 4, seed=n), weight


class SpectralZero(PublicFailure):
    """A layer that starts at 0, under spectral norm: its largest singular value 0 divides."""

    source = "https://github.com/pytorch/pytorch/issues/20192"

    def __init__(self) -> None:
        super().__init__()
        head = nn.Linear(8, 4)
        nn.init.zeros_(head.weight)
        self.inner = nn.Linear(4, 8)
        self.head = nn.utils.parametrizations.spectral_norm(head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.relu(self.inner(x))
        return F.cross_entropy(self.head(hidden), y)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n), torch.arange(8) % 4


def time_of(rows: int) -> tuple[Tensor, Tensor]:
    """Two samples whose quotient is Beta-distributed, each (rows,)."""
    first = torch.empty(rows, dtype=torch.bfloat16).uniform_(0, 1).pow(1 / 1.5)
    return first, torch.empty(rows, dtype=torch.bfloat16).uniform_(0, 1)


class BetaTime(PublicFailure):
    """Two samples in bfloat16 are both exactly 0, as happens in one of 65536 pairs: 0/0."""

    source = "https://github.com/huggingface/lerobot/issues/1096"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        gamma1, gamma2 = time_of(len(x))
        time = (gamma1 / (gamma1 + gamma2)).float()[:, None]
        return (self.net(time * noise + (1 - time) * x) - noise).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield normal(64, 4, seed=n), normal(64, 4, seed=n + 100)

    @staticmethod
    def seed() -> int:
        """The first one that draws two zeros at that step and at none before."""
        for seed in range(20_000):
            torch.manual_seed(seed)
            drawn = [time_of(64) for _ in range(BAD + 1)]
            zeros = [bool(((a + b) == 0).any()) for a, b in drawn]
            if zeros == [False] * BAD + [True]:
                return seed
        raise LookupError("no seed draws it")


class Phases(PublicFailure):
    """The phase of a sound that is almost silent: the square of 1e-25 is 0, and divides."""

    source = "https://github.com/pytorch/pytorch/issues/98276"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 8, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(self.net(x).view(len(x), 4, 2))
        phase = torch.angle(spectrum)
        return (phase - target).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(8, 4, seed=n)
            if n == BAD:
                x[5] *= 1e-25
            yield x, normal(8, 4, seed=n + 100)


class Sinkhorn(PublicFailure):
    """Optimal transport not in the log domain: exp(-cost/eps) is 0 for a point that is far away."""

    source = "https://github.com/PythonOT/POT/issues/54"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cost = (self.net(x)[:, None] - y[None]).pow(2).sum(-1)
        kernel = torch.exp(-cost / 0.2)
        share = torch.full((len(x),), 1 / len(x))
        v = share
        for _ in range(3):
            u = share / (kernel @ v)
            v = share / (kernel.T @ u)
        return (u[:, None] * kernel * v[None] * cost).sum()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            y = 0.2 * normal(6, 3, seed=n + 100)
            if n == BAD:
                y[2] = 50.0
            yield 0.2 * normal(6, 3, seed=n), y


class CompleteIou(PublicFailure):
    """A predicted box of height 0: atan(w/0) is finite, its derivative is 0 times infinity."""

    source = "https://github.com/pythonlessons/TensorFlow-2.x-YOLOv3/issues/144"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))

    def forward(self, x: Tensor, ratio: Tensor) -> Tensor:
        w, h = F.relu(self.net(x)).unbind(-1)
        shape = torch.atan(w / h)
        return (4 / math.pi**2 * (shape - torch.atan(ratio)).pow(2)).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = uniform(8, 4, seed=n) + 0.1
            if n == BAD:
                x[4, 2:] = -1.0
            yield x, uniform(8, seed=n + 100)


class SmallDeviation(PublicFailure):
    """A standard deviation of 1e-26 is allowed, its square is 0, and divides."""

    source = "https://github.com/ShangtongZhang/DeepRL/pull/5"
    num_inputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 1), nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.spread.weight, 0.2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(state), F.softplus(self.spread(state))

    @staticmethod
    def loss(output: tuple[Tensor, Tensor], state: Tensor, action: Tensor) -> Tensor:
        policy = Normal(*output)
        return -policy.log_prob(action).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            state = 0.3 * normal(8, 3, seed=n)
            if n == BAD:
                state[6] = -100.0
            yield state, normal(8, 1, seed=n + 100)


class CosineSchedule(PublicFailure):
    """A cosine schedule starts without any noise: the first step's posterior divides by 0."""

    source = "https://github.com/Project-MONAI/GenerativeModels/issues/489"
    signal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        time = torch.linspace(0, 1, 11)
        signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2).pow(2)
        self.register_buffer("signal", signal / signal[0])

    def forward(self, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, before = self.signal[time][:, None], self.signal[(time - 1).clamp(min=0)][:, None]
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        beta = 1 - self.signal[time + 1][:, None] / signal
        weight = before.sqrt() * beta / (1 - signal)
        return (weight * (self.net(noisy) - x).pow(2)).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            time = torch.arange(8) + 1
            if n == BAD:
                time[2] = 0
            yield normal(8, 4, seed=n), normal(8, 4, seed=n + 100), time


class DeadFeatures(PublicFailure):
    """The features of a place are all 0 after ReLU; they are divided in place by their largest."""

    source = "https://github.com/mihaidusmanu/d2-net/issues/78"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv1d(2, 4, 1, bias=False)
        with torch.no_grad():
            self.net.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.net(x))
        scores = features.clone()
        scores.div_(features.amax(1, keepdim=True))
        return (scores * features).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = uniform(4, 2, 6, seed=n) + 0.1
            if n == BAD:
                x[1, :, 2] = -1.0
            yield (x,)
