"""Public fixes that were added after the audit's search was built: a test on unseen cases."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lab.audit.fix_pair import FixPair, normal


class FocalPower(FixPair):
    """A focal loss has the root of a probability, whose slope is infinite at 0."""

    source = "https://github.com/kornia/kornia/issues/918"
    line = r"\.pow\(0\.5\)"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.net(x).sigmoid()
        q = 1 - p
        eps = 1e-8 if self.fixed else 0.0
        hit = (q + eps).pow(0.5) * y
        miss = (p + eps).pow(0.5) * (1 - y)
        return -(hit * (p + 1e-8).log() + miss * (q + 1e-8).log()).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), (normal(4, 6, seed=1) > 0).float()


class NoViolation(FixPair):
    """A triplet loss is averaged over the triplets that violate the margin, of which none may."""

    source = "https://github.com/KevinMusgrave/pytorch-metric-learning/issues/107"
    line = r"/ count"

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        a, p, n = self.net(anchor), self.net(positive), self.net(negative)
        violation = F.relu((a - p).square().sum(-1) - (a - n).square().sum(-1) + 0.2)
        count = (violation > 0).sum()
        if self.fixed and count == 0:
            return violation.mean()
        return violation.sum() / count

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 8, seed=1), normal(4, 8, seed=2)


class SingleAdvantage(FixPair):
    """Advantages are divided by their deviation, which one element alone does not have."""

    source = "https://github.com/DLR-RM/stable-baselines3/pull/1028"
    line = r"\.std\(\)"

    def forward(self, x: Tensor, advantage: Tensor) -> Tensor:
        if not self.fixed or len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        return -(advantage * self.net(x).mean(-1)).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, seed=1)


class AngleBetween(FixPair):
    """The angle between two directions is an acos, whose slope is infinite if they are equal."""

    source = "https://github.com/eigenvivek/nanodrr/pull/31"
    line = r"\.acos\(\)"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.net(x), dim=-1), F.normalize(self.net(y), dim=-1)
        cosine = (a * b).sum(-1)
        most = 1 - 1e-6 if self.fixed else 1.0
        return cosine.clamp(-most, most).acos().mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 8, seed=1)


class HalfMask(FixPair):
    """Hidden entries get float16's least number, below which a negative score takes them."""

    source = "https://github.com/huggingface/transformers/pull/18057"
    line = r"hidden \* least|softmax"
    dtypes = ("float16",)

    def build(self) -> None:
        self.net = nn.Linear(8, 12)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        queries, keys = self.net(x).chunk(2, dim=-1)
        least = torch.finfo(x.dtype).min
        scores = queries @ keys.T + hidden * least
        if self.fixed:
            scores = torch.maximum(scores, torch.tensor(least, dtype=x.dtype))
        return F.softmax(scores, dim=-1) @ keys

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.ones(4, 4).triu(1)
