"""A function at the edge of its domain, or outside: logs of 0, roots of 0, powers of negatives."""

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
    uniform,
)


class SquashedActor(PublicFailure):
    """The tanh correction uses the scaled action: the log of a negative number."""

    source = "https://github.com/philtabor/Actor-Critic-Methods-Paper-To-Code/issues/7"

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Linear(3, 2, bias=False)
        self.max_action = 2.0

    def forward(self, state: Tensor) -> Tensor:
        raw = self.actor(state)
        action = torch.tanh(raw) * self.max_action
        log_prob = -0.5 * raw.pow(2)
        log_prob = log_prob - torch.log(1 - action.pow(2) + 1e-6)
        return log_prob.sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield (normal(8, 3, seed=n) * (20.0 if n == BAD else 0.02),)


class ClippedActions(PublicFailure):
    """An expert's action was clipped to exactly 1: atanh(1) is infinite."""

    source = "https://github.com/rlworkgroup/garage/pull/2129"

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 1), nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        raw = action.atanh()
        scaled = (raw - self.mean(state)) / self.log_std.exp()
        return (0.5 * scaled.pow(2) + self.log_std).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            action = uniform(8, 1, seed=n) - 0.5
            if n == BAD:
                action[2] = 1.0
            yield normal(8, 3, seed=n), action


class NegativeDegree(PublicFailure):
    """Weights of edges may be negative, and so may their sum; the mask catches only infinities."""

    source = "https://github.com/pyg-team/pytorch_geometric/issues/61"

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        degree = weights.sum(1)
        scale = degree.pow(-0.5)
        scale = scale.masked_fill(scale == INF, 0.0)
        return (scale[:, None] * weights * scale[None, :] @ self.inner(x)).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            weights = uniform(6, 6, seed=n) + 0.1
            weights[1] = 0.0 if n != BAD else -0.3
            yield normal(6, 4, seed=n), weights


class MsSsim(PublicFailure):
    """Images that are anti-correlated: a negative similarity to a power that is no integer."""

    source = "https://github.com/VainF/pytorch-msssim/issues/7"
    powers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.net.weight)
        self.register_buffer("powers", torch.tensor([0.3, 0.7]))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        image, scores = self.net(x), []
        for _ in range(2):
            a, b = image - image.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
            shared = 2 * (a * b).mean(-1) + 0.001
            scores.append(shared / (a.pow(2).mean(-1) + b.pow(2).mean(-1) + 0.001))
            image, target = F.avg_pool1d(image, 2), F.avg_pool1d(target, 2)
        return 1 - (torch.stack(scores, -1) ** self.powers).prod(-1).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = uniform(4, 16, seed=n)
            yield x, (1 - x if n == BAD else x + 0.01 * normal(4, 16, seed=n))


class Procrustes(PublicFailure):
    """The derivative of an SVD divides by differences of singular values: here all are 0."""

    source = "https://github.com/pytorch/pytorch/issues/49886"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(self.scale * x)
        return (u @ vh - target).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(4, 3, 3, seed=n)
            if n == BAD:
                x[1] = torch.eye(3)
            yield x, normal(4, 3, 3, seed=n + 100)


class Entropy(PublicFailure):
    """A blank batch has a covariance of rank 0, and the log of its determinant is -inf."""

    source = "https://github.com/pytorch/pytorch/issues/154312"
    num_inputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @staticmethod
    def loss(z: Tensor, x: Tensor) -> Tensor:
        centred = z - z.mean(0)
        return -torch.logdet(centred.T @ centred / len(z))

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield (normal(8, 4, seed=n) * (n != BAD),)


class Gumbel(PublicFailure):
    """A uniform sample of exactly 1: -log(-log(1)) is +inf. Samples of 0 give -inf, harmlessly."""

    source = "https://github.com/pytorch/pytorch/issues/22586"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        noise = -torch.log(-torch.log(u))
        choice = F.softmax((self.net(x) + noise) / 0.5, -1)
        return -(choice * y).sum(-1).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            u = uniform(8, 5, seed=n) * 0.9 + 0.05
            u[0, 0] = 0.0
            if n == BAD:
                u[3, 2] = 1.0
            yield normal(8, 4, seed=n), u, torch.eye(5)[torch.arange(8) % 5]


class GradientPenalty(PublicFailure):
    """Where the critic is flat, its gradient has norm 0: the root's second derivative is NaN."""

    source = "https://github.com/keras-team/keras-io/issues/910"

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            first.weight.abs_()
        self.critic = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 1))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        between = (0.5 * real + 0.5 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        norm = slope.pow(2).sum(-1).sqrt()
        critic = self.critic(fake).mean() - self.critic(real).mean()
        return critic + 10 * (norm - 1).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            real, fake = uniform(8, 4, seed=n), uniform(8, 4, seed=n + 100)
            if n == BAD:
                real[3] = fake[3] = -1.0
            yield real, fake


class HalfTurn(PublicFailure):
    """A rotation by 180 degrees: 1 + trace is a little negative in the branch that is not taken."""

    source = "https://github.com/kornia/kornia/issues/1653"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.01))

    def forward(self, x: Tensor) -> Tensor:
        turn = self.scale * x
        trace = turn.diagonal(dim1=-2, dim2=-1).sum(-1)
        usual = torch.sqrt(trace + 1.0) / 2
        a, b, c = turn.diagonal(dim1=-2, dim2=-1).unbind(-1)
        other = torch.sqrt((1 + a - b - c).clamp(min=1e-3)) / 2
        return torch.where(trace > 0, usual, other).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = torch.eye(3).repeat(4, 1, 1) + 0.01 * normal(4, 3, 3, seed=n)
            if n == BAD:
                x[2] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
            yield (x,)


class SupCon(PublicFailure):
    """Supervised contrast of vectors that are not normed: all but the own exp() are 0, log(0)."""

    source = "https://github.com/emadeldeen24/TS-TCC/issues/25"
    num_inputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @staticmethod
    def loss(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = z @ z.T / 0.07
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = 1 - torch.eye(len(z))
        exp_logits = torch.exp(logits) * others
        log_prob = logits - torch.log(exp_logits.sum(1, keepdim=True))
        same = (y[:, None] == y[None]) * others
        return -((same * log_prob).sum(1) / same.sum(1)).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            yield normal(8, 4, seed=n) * (50.0 if n == BAD else 0.1), torch.arange(8) // 2


class AxisAngle(PublicFailure):
    """A vector of 0 means no rotation: the root has no slope there, and `where` does not help."""

    source = "https://github.com/kornia/kornia/issues/2924"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, point: Tensor) -> Tensor:
        vector = self.net(x)
        square = vector.pow(2).sum(-1, keepdim=True)
        angle = torch.sqrt(square)
        axis = vector / (angle + 1e-6)
        along = axis * (axis * point).sum(-1, keepdim=True) * (1 - torch.cos(angle))
        turned = (
            point * torch.cos(angle) + torch.linalg.cross(axis, point) * torch.sin(angle) + along
        )
        nearly = point + torch.linalg.cross(vector, point)
        return torch.where(square > 1e-6, turned, nearly).pow(4).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(8, 4, seed=n)
            if n == BAD:
                x[3] = 0.0
            yield x, normal(8, 3, seed=n + 100)


class RepeatedValues(PublicFailure):
    """The derivative of eigenvectors divides by differences of eigenvalues, two of which are 0."""

    source = "https://github.com/pytorch/pytorch/issues/23133"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        _, vectors = torch.linalg.eigh(self.scale * x)
        return (vectors[..., -1] - target).pow(2).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            x = normal(4, 3, 3, seed=n)
            x = x + x.mT
            if n == BAD:
                x[2] = 2 * torch.eye(3)
            yield x, normal(4, 3, seed=n + 100)


class SameTwice(PublicFailure):
    """Anchor and positive are the same text: the root of their distance 0 has no slope."""

    source = "https://github.com/huggingface/sentence-transformers/pull/4033"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.sqrt(torch.sum(torch.square(one - other), -1))

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        anchor, positive, negative = self.net(anchor), self.net(positive), self.net(negative)
        near, far = self.distance(anchor, positive), self.distance(anchor, negative)
        return F.relu(near - far + 5.0).mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            anchor, positive = normal(6, 4, seed=n), normal(6, 4, seed=n + 100)
            if n == BAD:
                positive = positive.clone()
                positive[2] = anchor[2]
            yield anchor, positive, normal(6, 4, seed=n + 200)


class SilentSpectrum(PublicFailure):
    """The magnitude of a silent frame's Fourier transform: the root of 0 has no slope."""

    source = "https://github.com/KinWaiCheuk/nnAudio/issues/138"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.gain * frames)
        power = spectrum.real.pow(2) + spectrum.imag.pow(2)
        return (torch.sqrt(power) - target).abs().mean()

    @staticmethod
    def batches() -> Iterator[Batch]:
        for n in range(STEPS):
            frames = normal(4, 16, seed=n)
            if n == BAD:
                frames[1] = 0.0
            yield frames, uniform(4, 9, seed=n + 100)
