"""Public fixes of roots, logarithms, exponentials and masks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lab.audit.fix_pair import INF, FixPair, normal, uniform


class RootThenEpsilon(FixPair):
    """A small number is added to a root, instead of to what is below the root."""

    source = "https://github.com/mpariente/pytorch_stoi/pull/14"
    line = r"\.sqrt\(\)"

    def forward(self, x: Tensor) -> Tensor:
        power = self.net(x).pow(2).sum(-1)
        if self.fixed:
            return (power + 1e-9).sqrt().mean()
        return (power.sqrt() + 1e-9).mean()


class SineOfAngle(FixPair):
    """The sine of an angle from its cosine, whose slope is infinite at 1."""

    source = "https://github.com/ronghuaiyang/arcface-pytorch/issues/91"
    line = r"torch\.sqrt"

    def forward(self, x: Tensor) -> Tensor:
        cosine = torch.tanh(self.net(x))
        inside = 1.0 - cosine.pow(2)
        inside = inside.clamp(1e-6, 1) if self.fixed else inside.clamp(0, 1)
        return torch.sqrt(inside).sum()


class FeatureNorm(FixPair):
    """Features are divided by their norm plus a small number; the root has no slope at 0."""

    source = "https://github.com/richzhang/PerceptualSimilarity/issues/69"
    line = r"torch\.sqrt"

    def forward(self, x: Tensor) -> Tensor:
        features = self.net(x)
        square = torch.sum(features**2, dim=1, keepdim=True)
        if self.fixed:
            return (features / torch.sqrt(square + 1e-10)).mean()
        return (features / (torch.sqrt(square) + 1e-10)).mean()


class InstanceDeviation(FixPair):
    """The deviation of an instance is 0 if it is constant."""

    source = "https://github.com/pyg-team/pytorch_geometric/issues/2559"
    line = r"\.sqrt\(\)"

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        out = out - out.mean(-1, keepdim=True)
        variance = (out * out).mean(-1, keepdim=True)
        if self.fixed:
            return (out / (variance + 1e-5).sqrt()).pow(3).mean()
        return (out / (variance.sqrt() + 1e-5)).pow(3).mean()


class GaussianDistance(FixPair):
    """The distance of two boxes is a root, which is 0 if they are equal."""

    source = "https://github.com/open-mmlab/mmrotate/issues/205"
    line = r"\.sqrt\(\)"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distance = (self.net(x) - self.net(y)).square().sum(-1)
        return (distance.clamp(1e-7) if self.fixed else distance).sqrt().mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 8, seed=1)


class GradientPenalty(FixPair):
    """The norm of a gradient, as a root of a sum of squares."""

    source = "https://github.com/keras-team/keras-io/issues/910"
    line = r"\.sqrt\(\)"

    def forward(self, x: Tensor) -> Tensor:
        slope = self.net.weight.sum(0) * x
        square = slope.pow(2).sum(-1)
        return ((square + 1e-12 if self.fixed else square).sqrt() - 1).pow(2).mean()


class LogOfSoftmax(FixPair):
    """The logarithm of a softmax, whose smallest entries underflow to 0."""

    source = "https://github.com/pytorch/pytorch/issues/1620"
    line = r"torch\.log\("

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        if self.fixed:
            return F.nll_loss(F.log_softmax(logits, -1), y, reduction="sum")
        return F.nll_loss(torch.log(F.softmax(logits, -1)), y, reduction="sum")

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.tensor([0, 1, 2, 3])


class MixtureLikelihood(FixPair):
    """A likelihood is the logarithm of a sum of exponentials."""

    source = "https://github.com/mlberkeley/scae-pytorch/pull/4"
    line = r"\.exp\(\)"

    def forward(self, x: Tensor) -> Tensor:
        parts = self.net(x)
        if self.fixed:
            return torch.logsumexp(parts, -1).mean()
        return parts.exp().sum(-1).log().mean()


class LogRatio(FixPair):
    """The ratio of two probabilities is the exponential of a difference of logarithms."""

    source = "https://github.com/THUDM/slime/pull/2198"
    line = r"\.exp\(\)"

    def forward(self, x: Tensor, old: Tensor) -> Tensor:
        ratio = self.net(x).mean(-1) - old
        if self.fixed:
            ratio = ratio.clamp(-20, 20)
        return (ratio.exp() - 1 - ratio).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, seed=1)


class LogVariance(FixPair):
    """The variance of a latent is the exponential of what a layer predicts."""

    source = "https://github.com/vanderschaarlab/synthcity/issues/331"
    line = r"\.exp\(\)"

    def forward(self, x: Tensor) -> Tensor:
        mean, logvar = self.net(x).chunk(2, dim=-1)
        if self.fixed:
            logvar = logvar.clamp(-30, 20)
        return (mean.pow(2) + logvar.exp() - logvar - 1).mean()


class SquashedAction(FixPair):
    """The density of a squashed action has the logarithm of 1 less its square."""

    source = "https://github.com/philtabor/Actor-Critic-Methods-Paper-To-Code/issues/7"
    line = r"torch\.log\("

    def forward(self, x: Tensor) -> Tensor:
        action = torch.tanh(self.net(x))
        if self.fixed:
            return torch.log(1 - action.pow(2) + 1e-6).sum(-1).mean()
        return torch.log(1 - action.pow(2)).sum(-1).mean()


class ClippedActions(FixPair):
    """The action before squashing is the atanh of a given action, which may be 1."""

    source = "https://github.com/rlworkgroup/garage/pull/2129"
    line = r"\.atanh\(\)"

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        if self.fixed:
            action = action.clamp(-1 + 1e-6, 1 - 1e-6)
        return (self.net(x) - action.atanh()).pow(2).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), 0.9 * (2 * uniform(4, 6) - 1)


class Similarity(FixPair):
    """Powers of a similarity that may be negative."""

    source = "https://github.com/VainF/pytorch-msssim/issues/7"
    line = r"\*\*0\.3"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        similarity = F.cosine_similarity(self.net(x), y, dim=-1)
        if self.fixed:
            similarity = similarity.clamp(min=1e-4)
        return (similarity**0.3).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        x = normal(4, 8)
        torch.manual_seed(0)
        return x, nn.Linear(8, 6)(x).detach() + 0.1


class TokenEntropy(FixPair):
    """A masked token has the probability 0, and the logarithm of it is multiplied by it."""

    source = "https://github.com/huggingface/trl/pull/7263"
    line = r"\* logs"

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        logs = F.log_softmax(self.net(x).masked_fill(blocked, -INF), -1)
        if self.fixed:
            logs = logs.masked_fill(blocked, 0.0)
            return -(logs.exp().masked_fill(blocked, 0.0) * logs).sum(-1).mean()
        return -(logs.exp() * logs).sum(-1).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        blocked = torch.zeros(4, 6, dtype=torch.bool)
        return normal(4, 8), blocked


class MaskedAttention(FixPair):
    """A row of attention in which everything is hidden is the softmax of nothing but -inf."""

    source = "https://github.com/jadore801120/attention-is-all-you-need-pytorch/issues/5"
    line = r"softmax"

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        keys = self.net(x)
        scores = keys @ keys.T
        if self.fixed:
            scores = scores.masked_fill(hidden, -1e9)
        else:
            scores = scores.masked_fill(hidden, -INF)
        return F.softmax(scores, dim=-1) @ keys

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.zeros(4, 4, dtype=torch.bool)


class AllLabelsMasked(FixPair):
    """Every label of a batch is the one that the loss ignores."""

    source = "https://github.com/nvidia-cosmos/cosmos-rl/pull/155"
    line = r"F\.cross_entropy"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        if self.fixed:
            total = F.cross_entropy(logits, y, reduction="sum")
            return total / (y != -100).sum().clamp(min=1)
        return F.cross_entropy(logits, y)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.tensor([0, 1, 2, 3])


class NoObject(FixPair):
    """A loss over the objects of an image is the mean of nothing if it has none."""

    source = "https://github.com/zhang-tao-whu/e2ec/issues/7"
    line = r"smooth_l1_loss"

    def forward(self, x: Tensor, y: Tensor, is_object: Tensor) -> Tensor:
        out, target = self.net(x)[is_object], y[is_object]
        if self.fixed:
            total = F.smooth_l1_loss(out, target, reduction="sum")
            return total / is_object.sum().clamp(min=1)
        return F.smooth_l1_loss(out, target)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 6, seed=1), torch.tensor([True, False, True, True])


class SampledGumbel(FixPair):
    """A double logarithm of a number that may be 0 or 1."""

    source = "https://github.com/pytorch/pytorch/issues/22586"
    line = r"torch\.log"

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if self.fixed:
            gumbel = -torch.log(-torch.log(noise.clamp(1e-6, 1 - 1e-6)))
        else:
            gumbel = -torch.log(-torch.log(noise))
        return F.softmax(self.net(x) + gumbel, -1).pow(2).sum()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), uniform(4, 6) * 0.98 + 0.01


class HalfSum(FixPair):
    """A sum over the pixels of an image exceeds the largest number of float16."""

    source = "https://github.com/qubvel-org/segmentation_models.pytorch/issues/463"
    line = r"\.sum\(\)"
    dtypes = ("float16",)

    def build(self) -> None:
        self.net = nn.Linear(8, 100)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        p = self.net(x).sigmoid()
        if self.fixed:
            p, mask = p.float(), mask.float()
        return 1 - (p * mask).sum() / (p.sum() + 1)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(1024, 8), (uniform(1024, 100) > 0.2).float()


class ComplexAmplitude(FixPair):
    """The amplitude of a complex number, as a root of two squares."""

    source = "https://github.com/espnet/espnet/pull/3904"
    line = r"\*\* 0\.5"

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = self.net(x).chunk(2, dim=-1)
        power = real**2 + imaginary**2
        return ((power + 1e-8 if self.fixed else power) ** 0.5).mean()
