"""Failures of training that people reported, rebuilt small; what is said of each.

Each case names its source. Expected are the step, a piece of the guilty line (None where no line of
the user's is guilty) and the cause. They were written before the library was run on them.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader

from nonfinite import watch
from nonfinite.lightning import (
    ActivationWatch,
    EarlyWarning,
    GradientWatch,
    GuardConfig,
    IncidentRecorder,
    SpikeWatch,
    StepGuard,
)

STEPS = 10
BAD = 6
"""The batch that fails, counted from 0: the seventh step."""
INF = float("inf")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Vae(nn.Module):
    """An image in 0..255 among images in 0..1: its log-variance is 102, and exp(102) is infinite.

    https://github.com/vanderschaarlab/synthcity/issues/331
    """

    INPUTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8, bias=False), nn.Linear(4, 8)
        with torch.no_grad():
            self.encoder.weight[4:] = 0.05

    def forward(self, x):
        mean, logvar = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decoder(z), mean, logvar

    @staticmethod
    def loss(output, x):
        reconstruction, mean, logvar = output
        distance = F.binary_cross_entropy_with_logits(reconstruction, x.clamp(0, 1))
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return distance + kl / len(x)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = uniform(8, 8, seed=n)
            if n == BAD:
                x[3] = 255.0
            yield (x,)


class SquashedActor(nn.Module):
    """The correction of tanh is taken of the scaled action: the log of a negative number.

    https://github.com/philtabor/Actor-Critic-Methods-Paper-To-Code/issues/7
    """

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Linear(3, 2, bias=False)
        self.max_action = 2.0

    def forward(self, state):
        raw = self.actor(state)
        action = torch.tanh(raw) * self.max_action
        log_prob = -0.5 * raw.pow(2)
        log_prob = log_prob - torch.log(1 - action.pow(2) + 1e-6)
        return log_prob.sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield (normal(8, 3, seed=n) * (20.0 if n == BAD else 0.02),)


class ClippedActions(nn.Module):
    """An expert's action was clipped to exactly 1: atanh(1) is infinite.

    https://github.com/rlworkgroup/garage/pull/2129
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 1), nn.Parameter(torch.zeros(1))

    def forward(self, state, action):
        raw = action.atanh()
        scaled = (raw - self.mean(state)) / self.log_std.exp()
        return (0.5 * scaled.pow(2) + self.log_std).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            action = uniform(8, 1, seed=n) - 0.5
            if n == BAD:
                action[2] = 1.0
            yield normal(8, 3, seed=n), action


class IsolatedNode(nn.Module):
    """A node without edges: its degree 0 to the power of -0.5 is infinite, times 0 NaN.

    https://github.com/mlx-graphs/mlx-graphs/pull/18
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x, edges):
        degree = edges.sum(1)
        scale = degree.pow(-0.5)
        normed = scale[:, None] * edges * scale[None, :]
        return self.outer(F.relu(normed @ self.inner(x))).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            edges = torch.ones(6, 6)
            if n == BAD:
                edges[4, :] = edges[:, 4] = 0.0
            yield normal(6, 4, seed=n), edges


class NegativeDegree(nn.Module):
    """Weights of edges may be negative, and so may their sum; the mask catches only infinities.

    https://github.com/pyg-team/pytorch_geometric/issues/61
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x, weights):
        degree = weights.sum(1)
        scale = degree.pow(-0.5)
        scale = scale.masked_fill(scale == INF, 0.0)
        return (scale[:, None] * weights * scale[None, :] @ self.inner(x)).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            weights = uniform(6, 6, seed=n) + 0.1
            weights[1] = 0.0 if n != BAD else -0.3
            yield normal(6, 4, seed=n), weights


class MsSsim(nn.Module):
    """Images that are anti-correlated: a negative similarity to a power that is no integer.

    https://github.com/VainF/pytorch-msssim/issues/7
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.net.weight)
        self.register_buffer("powers", torch.tensor([0.3, 0.7]))

    def forward(self, x, target):
        image, scores = self.net(x), []
        for _ in range(2):
            a, b = image - image.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
            shared = 2 * (a * b).mean(-1) + 0.001
            scores.append(shared / (a.pow(2).mean(-1) + b.pow(2).mean(-1) + 0.001))
            image, target = F.avg_pool1d(image, 2), F.avg_pool1d(target, 2)
        return 1 - (torch.stack(scores, -1) ** self.powers).prod(-1).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = uniform(4, 16, seed=n)
            yield x, (1 - x if n == BAD else x + 0.01 * normal(4, 16, seed=n))


class Procrustes(nn.Module):
    """The derivative of an SVD divides by the differences of singular values: here all are equal.

    https://github.com/pytorch/pytorch/issues/49886
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, target):
        u, _, vh = torch.linalg.svd(self.scale * x)
        return (u @ vh - target).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = normal(4, 3, 3, seed=n)
            if n == BAD:
                x[1] = torch.eye(3)
            yield x, normal(4, 3, 3, seed=n + 100)


class Entropy(nn.Module):
    """A batch of blank images has a covariance of rank 0, and the log of its determinant is -inf.

    https://github.com/pytorch/pytorch/issues/154312
    """

    INPUTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.net(x)

    @staticmethod
    def loss(z, x):
        centred = z - z.mean(0)
        return -torch.logdet(centred.T @ centred / len(z))

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield (normal(8, 4, seed=n) * (n != BAD),)


class Gumbel(nn.Module):
    """A uniform sample of exactly 1: -log(-log(1)) is +inf. Samples of 0 give -inf, harmlessly.

    https://github.com/pytorch/pytorch/issues/22586
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x, u, y):
        noise = -torch.log(-torch.log(u))
        choice = F.softmax((self.net(x) + noise) / 0.5, -1)
        return -(choice * y).sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            u = uniform(8, 5, seed=n) * 0.9 + 0.05
            u[0, 0] = 0.0
            if n == BAD:
                u[3, 2] = 1.0
            yield normal(8, 4, seed=n), u, torch.eye(5)[torch.arange(8) % 5]


class SmoothedLabels(nn.Module):
    """Smoothing of labels gives a share to a class that was masked with -inf: the loss is inf.

    https://github.com/facebookresearch/pytext/pull/1698
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x, y, blocked):
        logits = self.net(x).masked_fill(blocked, -INF)
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            blocked = torch.zeros(8, 5, dtype=torch.bool)
            blocked[2, 4] = n == BAD
            yield normal(8, 4, seed=n), torch.arange(8) % 4, blocked


class SoftTargets(nn.Module):
    """A class that is masked with -inf has target 0: 0 times -inf.

    https://github.com/google-deepmind/optax/issues/896
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x, target, blocked):
        log_probs = F.log_softmax(self.net(x).masked_fill(blocked, -INF), -1)
        return -(target * log_probs).sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            blocked = torch.zeros(8, 5, dtype=torch.bool)
            blocked[2, 4] = n == BAD
            target = torch.full((8, 5), 0.25)
            target[:, 4] = 0.0
            yield normal(8, 4, seed=n), target, blocked


class HiddenMarkov(nn.Module):
    """A state that cannot be reached: logsumexp of a column of -inf; loss finite, gradient NaN.

    https://github.com/pytorch/pytorch/issues/31829
    """

    def __init__(self) -> None:
        super().__init__()
        self.net, self.moves = nn.Linear(3, 4), nn.Parameter(torch.zeros(4, 4))

    def forward(self, x, allowed):
        moves = self.moves.masked_fill(~allowed, -INF)
        alpha = torch.zeros(4)
        for scores in self.net(x):
            alpha = torch.logsumexp(alpha[:, None] + moves, 0) + scores
        return torch.logsumexp(alpha, 0)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            allowed = torch.ones(4, 4, dtype=torch.bool).triu()
            if n == BAD:
                allowed[:, 2] = False
            yield normal(5, 3, seed=n), allowed


class MinSnr(nn.Module):
    """A noise schedule that ends in pure noise: the signal-to-noise ratio 0 divides.

    https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/issues/2
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("signal", torch.linspace(0.99, 0.0, 10))

    def forward(self, x, noise, time):
        signal = self.signal[time][:, None]
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        snr = signal / (1 - signal)
        weight = snr.clamp(max=5.0) / snr
        return (weight * (self.net(noisy) - noise).pow(2)).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            time = torch.arange(8)
            if n == BAD:
                time[5] = 9
            yield normal(8, 4, seed=n), normal(8, 4, seed=n + 100), time


class UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (gradient.norm(dim=-1, keepdim=True) + 1e-8)


class NormedGradients(nn.Module):
    """Normed gradients in float16, where 1e-8 is 0; a row of weight 0 has no gradient: 0/0.

    https://github.com/cloneofsimo/vqgan-training/issues/3, in float16
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4).half()

    def forward(self, x, weight):
        hidden = UnitGradient.apply(self.net(x.half()))
        return (weight * hidden.float().pow(2).mean(-1)).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            weight = torch.ones(8)
            weight[2] = n != BAD
            yield normal(8, 4, seed=n), weight


class SpectralZero(nn.Module):
    """A layer that starts at 0, under spectral norm: its largest singular value 0 divides.

    https://github.com/pytorch/pytorch/issues/20192
    """

    def __init__(self) -> None:
        super().__init__()
        head = nn.Linear(8, 4)
        nn.init.zeros_(head.weight)
        self.inner = nn.Linear(4, 8)
        self.head = nn.utils.parametrizations.spectral_norm(head)

    def forward(self, x, y):
        hidden = F.relu(self.inner(x))
        return F.cross_entropy(self.head(hidden), y)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n), torch.arange(8) % 4


class AdaSmooth(torch.optim.Optimizer):
    """A parameter that starts at 0 has not moved at the first step: the ratio of moves is 0/0."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
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


class ZeroBias(nn.Module):
    """The optimizer above, on a bias that starts at 0.

    https://github.com/kozistr/pytorch_optimizer/pull/522
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        nn.init.zeros_(self.net.bias)

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)

    @staticmethod
    def optimizer(model):
        return AdaSmooth(model.parameters(), lr=1e-2)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n), torch.arange(8) % 4


class HalfDice(nn.Module):
    """Dice in float16: a sum over 512 x 512 pixels is above 65504.

    https://github.com/qubvel-org/segmentation_models.pytorch/issues/463
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).half()

    def forward(self, pixels, mask):
        p = self.net(pixels).sigmoid().squeeze(-1)
        overlap = torch.sum(p * mask)
        total = torch.sum(p) + torch.sum(mask)
        return 1 - (2 * overlap + 1) / (total + 1)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            pixels = 512 * 512 if n == BAD else 128 * 128
            yield uniform(pixels, 3, seed=n).half(), torch.ones(pixels, dtype=torch.float16)


class GradientPenalty(nn.Module):
    """Where the critic is flat, its gradient has norm 0: the root's second derivative is NaN.

    https://github.com/keras-team/keras-io/issues/910
    """

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 1))
        with torch.no_grad():
            self.critic[0].weight.abs_()

    def forward(self, real, fake):
        between = (0.5 * real + 0.5 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        norm = slope.pow(2).sum(-1).sqrt()
        critic = self.critic(fake).mean() - self.critic(real).mean()
        return critic + 10 * (norm - 1).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            real, fake = uniform(8, 4, seed=n), uniform(8, 4, seed=n + 100)
            if n == BAD:
                real[3] = fake[3] = -1.0
            yield real, fake


def time_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.empty(rows, dtype=torch.bfloat16).uniform_(0, 1).pow(1 / 1.5)
    return first, torch.empty(rows, dtype=torch.bfloat16).uniform_(0, 1)


class BetaTime(nn.Module):
    """Two samples in bfloat16 are both exactly 0, as happens in one of 65536 pairs: 0/0.

    https://github.com/huggingface/lerobot/issues/1096
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x, noise):
        gamma1, gamma2 = time_of(len(x))
        time = (gamma1 / (gamma1 + gamma2)).float()[:, None]
        return (self.net(time * noise + (1 - time) * x) - noise).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
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


class HalfTurn(nn.Module):
    """A rotation by 180 degrees: 1 + trace is a little negative in the branch that is not taken.

    https://github.com/kornia/kornia/issues/1653
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.01))

    def forward(self, x):
        turn = self.scale * x
        trace = turn.diagonal(dim1=-2, dim2=-1).sum(-1)
        usual = torch.sqrt(trace + 1.0) / 2
        a, b, c = turn.diagonal(dim1=-2, dim2=-1).unbind(-1)
        other = torch.sqrt((1 + a - b - c).clamp(min=1e-3)) / 2
        return torch.where(trace > 0, usual, other).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = torch.eye(3).repeat(4, 1, 1) + 0.01 * normal(4, 3, 3, seed=n)
            if n == BAD:
                x[2] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
            yield (x,)


class Phases(nn.Module):
    """The phase of a sound that is almost silent: the square of 1e-25 is 0, and divides.

    https://github.com/pytorch/pytorch/issues/98276
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 8, bias=False)

    def forward(self, x, target):
        spectrum = torch.view_as_complex(self.net(x).view(len(x), 4, 2))
        phase = torch.angle(spectrum)
        return (phase - target).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = normal(8, 4, seed=n)
            if n == BAD:
                x[5] *= 1e-25
            yield x, normal(8, 4, seed=n + 100)


class MaskedLogSoftmax(nn.Module):
    """log(mask) is added to the scores: -inf at every step, and at one in a whole row.

    https://github.com/allenai/allennlp/issues/890
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 6)

    def forward(self, x, mask):
        weights = F.log_softmax(self.net(x) + mask.log(), -1).exp()
        return weights.pow(2).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            mask = torch.ones(8, 6)
            mask[:, 4:] = 0.0
            if n == BAD:
                mask[3] = 0.0
            yield normal(8, 4, seed=n), mask


class Sinkhorn(nn.Module):
    """Optimal transport not in the log domain: exp(-cost/eps) is 0 for a point that is far away.

    https://github.com/PythonOT/POT/issues/54
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x, y):
        cost = (self.net(x)[:, None] - y[None]).pow(2).sum(-1)
        kernel = torch.exp(-cost / 0.2)
        share = torch.full((len(x),), 1 / len(x))
        v = share
        for _ in range(3):
            u = share / (kernel @ v)
            v = share / (kernel.T @ u)
        return (u[:, None] * kernel * v[None] * cost).sum()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            y = 0.2 * normal(6, 3, seed=n + 100)
            if n == BAD:
                y[2] = 50.0
            yield 0.2 * normal(6, 3, seed=n), y


class SupCon(nn.Module):
    """Supervised contrast of vectors that are not normed: all but the own exp() are 0, log(0).

    https://github.com/emadeldeen24/TS-TCC/issues/25
    """

    INPUTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)

    @staticmethod
    def loss(z, x, y):
        logits = z @ z.T / 0.07
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = 1 - torch.eye(len(z))
        exp_logits = torch.exp(logits) * others
        log_prob = logits - torch.log(exp_logits.sum(1, keepdim=True))
        same = (y[:, None] == y[None]) * others
        return -((same * log_prob).sum(1) / same.sum(1)).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n) * (50.0 if n == BAD else 0.1), torch.arange(8) // 2


class CompleteIou(nn.Module):
    """A predicted box of height 0: atan(w/0) is finite, its derivative is 0 times infinity.

    https://github.com/pythonlessons/TensorFlow-2.x-YOLOv3/issues/144
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))

    def forward(self, x, ratio):
        w, h = F.relu(self.net(x)).unbind(-1)
        shape = torch.atan(w / h)
        return (4 / math.pi**2 * (shape - torch.atan(ratio)).pow(2)).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            x = uniform(8, 4, seed=n) + 0.1
            if n == BAD:
                x[4, 2:] = -1.0
            yield x, uniform(8, seed=n + 100)


class SmallDeviation(nn.Module):
    """A standard deviation of 1e-26 is allowed, its square is 0, and divides.

    https://github.com/ShangtongZhang/DeepRL/pull/5
    """

    INPUTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 1), nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.spread.weight, 0.2)

    def forward(self, state):
        return self.mean(state), F.softplus(self.spread(state))

    @staticmethod
    def loss(output, state, action):
        policy = Normal(*output)
        return -policy.log_prob(action).mean()

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            state = 0.3 * normal(8, 3, seed=n)
            if n == BAD:
                state[6] = -100.0
            yield state, normal(8, 1, seed=n + 100)


class NoInstance(nn.Module):
    """The second micro-batch of a step has no object: the mean over none of its boxes.

    https://github.com/zhang-tao-whu/e2ec/issues/7
    """

    MICRO = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x, boxes, found):
        return F.smooth_l1_loss(self.net(x)[found], boxes[found])

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(2 * STEPS):
            found = torch.arange(8) % 2 == 0
            if n == 2 * BAD + 1:
                found = torch.zeros(8, dtype=torch.bool)
            yield normal(8, 4, seed=n), normal(8, 4, seed=n + 100), found


class Diverges(nn.Module):
    """A learning rate that is much too high: the error grows with every step.

    https://discuss.pytorch.org/t/finding-coefficients-of-a-polynomial-through-linear-regression/71751
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x, y):
        return (self.net(x) - y).pow(2).mean()

    @staticmethod
    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    @staticmethod
    def batches() -> Iterator[tuple]:
        for n in range(30):
            yield 10 * normal(16, 4, seed=n), normal(16, 1, seed=n + 100)


class DeadCode(nn.Module):
    """A code that no vector chose: its moving average is 0/0, and is read at the next step.

    https://github.com/maxjcohen/vqvae/issues/1
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.register_buffer("codes", normal(4, 2))
        self.codes[3] = 100.0
        self.register_buffer("counts", torch.zeros(4))
        self.register_buffer("sums", torch.zeros(4, 2))

    def forward(self, x):
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
    def batches() -> Iterator[tuple]:
        for n in range(STEPS):
            yield (normal(8, 4, seed=n),)


@dataclass(frozen=True)
class Case:
    model: type[nn.Module]
    step: int | None
    line: str | None
    cause: str
    loop: str = "watch"

    @property
    def batches(self) -> list[tuple]:
        return list(self.model.batches())

    def built(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.model()
        optimizer = getattr(self.model, "optimizer", sgd)(model)
        torch.manual_seed(self.model.seed() if hasattr(self.model, "seed") else 0)
        return model, optimizer


ZERO = "division by zero"
EDGE = "infinite slope at the edge"
DOMAIN = "outside the domain"
LOG = "log of zero"
CASES = [
    Case(Vae, 7, r"logvar\.exp\(\)", "exp overflow"),
    Case(SquashedActor, 7, r"torch\.log\(1 - ", DOMAIN, "lightning"),
    Case(ClippedActions, 7, r"\.atanh\(\)", f"{EDGE}|{DOMAIN}"),
    Case(IsolatedNode, 7, r"degree\.pow\(", f"{ZERO}|{EDGE}", "lightning"),
    Case(NegativeDegree, 7, r"degree\.pow\(", DOMAIN),
    Case(MsSsim, 7, r"\*\* self\.powers", DOMAIN),
    # The slope is infinite, and what torch divides by is 0: both are true.
    Case(Procrustes, 7, r"torch\.linalg\.svd", f"{ZERO}|{EDGE}"),
    Case(Entropy, 7, r"torch\.logdet", LOG),
    Case(Gumbel, 7, r"torch\.log\(-torch\.log", LOG, "lightning"),
    Case(SmoothedLabels, 7, r"masked_fill", "non-finite value written", "lightning"),
    Case(SoftTargets, 7, r"target \* log_probs", "zero times infinity", "lightning"),
    Case(
        HiddenMarkov,
        7,
        r"torch\.logsumexp\(alpha\[",
        "infinity minus infinity|fully masked row",
    ),
    Case(MinSnr, 7, r"/ snr", ZERO, "lightning"),
    Case(NormedGradients, 7, r"gradient / |UnitGradient\.apply", f"{ZERO}|bad gradient"),
    Case(SpectralZero, 1, r"self\.head\(", ZERO),
    Case(ZeroBias, 1, None, "optimizer update", "lightning"),
    Case(HalfDice, 7, r"torch\.sum\(p \* mask\)", "float16 overflow", "lightning"),
    Case(GradientPenalty, 7, r"\.sqrt\(\)", EDGE),
    Case(BetaTime, 7, r"gamma1 / \(gamma1", ZERO),
    Case(HalfTurn, 7, r"torch\.sqrt\(trace", DOMAIN),
    Case(Phases, 7, r"torch\.angle", f"{ZERO}|{EDGE}", "lightning"),
    Case(MaskedLogSoftmax, 7, r"log_softmax", "fully masked row"),
    Case(Sinkhorn, 7, r"share / \(kernel", ZERO, "lightning"),
    Case(SupCon, 7, r"torch\.log\(exp_logits", LOG),
    Case(CompleteIou, 7, r"w / h", ZERO, "lightning"),
    Case(SmallDeviation, 7, r"\.log_prob\(", "division by (zero|a tiny)"),
    Case(NoInstance, 7, r"smooth_l1_loss", "mean of an empty", "lightning"),
    Case(Diverges, None, None, "exploding weights", "lightning"),
    Case(DeadCode, 2, None, "non-finite weights|unknown", "lightning"),
]


def loss_of(model: nn.Module, output: Any, batch: tuple) -> torch.Tensor:
    return model.loss(output, *batch) if hasattr(model, "loss") else output


def plain(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, bool]]:
    """Trains in a plain loop; yields each step, and whether its losses are finite, twice."""
    micro = getattr(case.model, "MICRO", 1)
    batches = case.batches
    for step in range(len(batches) // micro):
        optimizer.zero_grad()
        finite = True
        for batch in batches[step * micro : (step + 1) * micro]:
            inputs = batch[: getattr(case.model, "INPUTS", None)]
            loss = loss_of(model, model(*inputs), batch)
            loss.backward()
            finite = finite and bool(loss.isfinite())
        yield step + 1, finite
        optimizer.step()
        yield step + 1, finite


def fails_at(case: Case) -> int | None:
    """The first step whose loss or gradient, or whose weights after it, are not finite."""
    model, optimizer = case.built()
    for step, finite in plain(case, model, optimizer):
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        if not finite or not all(t.isfinite().all() for t in tensors):
            return step
    return None


class Task(pl.LightningModule):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self.made = model, optimizer

    def training_step(self, batch, batch_idx):
        return self.model(*batch)

    def configure_optimizers(self):
        return self.made


def by_lightning(case: Case, folder: Path) -> list[str]:
    said: list[str] = []
    model, optimizer = case.built()
    batches, micro = case.batches, getattr(case.model, "MICRO", 1)
    guard = StepGuard(
        GuardConfig(
            check=["loss", "gradients"], on_nonfinite="skip", max_consecutive=None, on_alarm="none"
        ),
        max_steps=len(batches) // micro,
        log_every=2,
    )
    callbacks = [
        guard,
        GradientWatch(every=2),
        SpikeWatch(guard, every=2),
        ActivationWatch(every=2),
        EarlyWarning(say=said.append),
        IncidentRecorder(folder, say=said.append),
    ]
    trainer = pl.Trainer(
        max_steps=len(batches) // micro,
        callbacks=callbacks,
        accumulate_grad_batches=micro,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Task(model, optimizer), DataLoader(batches, batch_size=None))
    return said


def by_watch(case: Case, folder: Path) -> list[str]:
    model, optimizer = case.built()
    batch: tuple = ()
    compute: Callable | None = None
    if hasattr(model, "loss"):
        compute = lambda output: model.loss(output, *batch)  # noqa: E731
    watch(model, optimizer, on_nonfinite="skip", folder=folder, loss_of=compute)
    for batch in case.batches:
        optimizer.zero_grad()
        output = model(*batch[: getattr(case.model, "INPUTS", None)])
        loss_of(model, output, batch).backward()
        optimizer.step()
    return []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.__name__)
def test_a_public_failure_is_explained(case, tmp_path):
    step = fails_at(case)
    assert step is not None and case.step in (None, step), f"the case itself fails at {step}"
    run = by_lightning if case.loop == "lightning" else by_watch
    print(*run(case, tmp_path), sep="\n")
    files = sorted(tmp_path.glob("step-*/incident.json"), key=lambda f: int(f.parent.name[5:]))
    incidents = [i for i in map(json.loads, map(Path.read_text, files)) if i["cause"] != "spike"]
    assert incidents, "nothing was recorded"
    incident = incidents[0]
    code = str((incident.get("source") or {}).get("code"))
    wrong = []
    if incident["step"] != step:
        wrong.append(f"step {incident['step']}, not {step}")
    if not re.search(case.cause, str(incident["cause"])):
        wrong.append(f"cause '{incident['cause']}', not '{case.cause}'")
    if case.line is not None and not re.search(case.line, code):
        wrong.append(f"line '{code}', not '{case.line}'")
    assert not wrong, "; ".join(wrong)
