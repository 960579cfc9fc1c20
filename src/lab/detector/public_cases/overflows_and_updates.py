"""Numbers that overflow, and failures of the optimizer or of a buffer rather than of a batch."""

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
    uniform,
)


class Vae(PublicFailure):
    """An image in 0..255 among images in 0..1: its log-variance is 102, and exp overflows."""

    source = "https://github.com/vanderschaarlab/synthcity/issues/331"
    num_inputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8, bias=False), nn.Linear(4, 8)
        with torch.no_grad():
            self.encoder.weight[4:] = 0.05

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decoder(z), mean, logvar

    @staticmethod
    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        reconstruction, mean, logvar = output
        distance = F.binary_cross_entropy_with_logits(reconstruction, x.clamp(0, 1))
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return distance + kl / len(x)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = uniform(8, 8, seed=n)
            if n == BAD:
                x[3] = 255.0
            yield (x,)


class HalfDice(PublicFailure):
    """Dice in float16: a sum over 512 x 512 pixels is above 65504."""

    source = "https://github.com/qubvel-org/segmentation_models.pytorch/issues/463"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).half()

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        p = self.net(pixels).sigmoid().squeeze(-1)
        overlap = torch.sum(p * mask)
        total = torch.sum(p) + torch.sum(mask)
        return 1 - (2 * overlap + 1) / (total + 1)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            pixels = 512 * 512 if n == BAD else 128 * 128
            yield uniform(pixels, 3, seed=n).half(), torch.ones(pixels, dtype=torch.float16)


class Diverges(PublicFailure):
    """A learning rate that is much too high: the error grows with every step."""

    source = "https://discuss.pytorch.org/t/finding-coefficients-of-a-polynomial-through-linear-regression/71751"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).pow(2).mean()

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(30):
            yield 10 * normal(16, 4, seed=n), normal(16, 1, seed=n + 100)


class AdaSmooth(torch.optim.Optimizer):
    """A parameter that starts at 0 has not moved at the first step: the ratio of moves is 0/0."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({key: torch.zeros_like(p) for key in ("last", "signed", "size")})
                move = p - state["last"]
                state["signed"].mul_(0.9).add_(move)
                state["size"].mul_(0.9).add_(move.abs())
                ratio = state["signed"].sum().abs() / state["size"].sum()
                state["last"].copy_(p)
                p.sub_(group["lr"] * ratio * p.grad)
        return loss


class ZeroBias(PublicFailure):
    """The optimizer above, on a bias that starts at 0."""

    source = "https://github.com/kozistr/pytorch_optimizer/pull/522"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        nn.init.zeros_(self.net.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return AdaSmooth(model.parameters(), lr=1e-2)

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n), torch.arange(8) % 4


class DeadCode(PublicFailure):
    """A code that no vector chose: its moving average is 0/0, and is read at the next step."""

    source = "https://github.com/maxjcohen/vqvae/issues/1"
    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.register_buffer("codes", normal(4, 2))
        self.codes[3] = 100.0
        self.register_buffer("counts", torch.zeros(4))
        self.register_buffer("sums", torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        chosen = torch.cdist(z.detach(), self.codes).argmin(-1)
        loss = (z - self.codes[chosen]).pow(2).mean()
        with torch.no_grad():
            is_chosen = F.one_hot(chosen, 4).float()
            self.counts.mul_(0.9).add_(0.1 * is_chosen.sum(0))
            self.sums.mul_(0.9).add_(0.1 * is_chosen.T @ z)
            self.codes.copy_(self.sums / self.counts[:, None])
        return loss

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield (normal(8, 4, seed=n),)
