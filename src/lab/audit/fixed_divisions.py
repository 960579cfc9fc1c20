"""Public fixes of divisions by zero."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lab.audit.fix_pair import FixPair, normal, uniform


class PaddingBatch(FixPair):
    """A loss is divided by the number of tokens that count, which is 0 in a batch of padding."""

    source = "https://github.com/PrimeIntellect-ai/prime-rl/pull/808"
    line = r"/ scale"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        losses = self.net(x).pow(2).mean(-1)
        scale = mask.sum()
        if self.fixed:
            scale = scale.clamp(min=1.0)
        return (losses * mask).sum() / scale

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.tensor([1.0, 1.0, 0.0, 1.0])


class CamWeights(FixPair):
    """Weights of an activation map are divided by a sum of gradients that may all be 0."""

    source = "https://github.com/frgfm/torch-cam/pull/187"
    line = r"/ total"

    def forward(self, x: Tensor) -> Tensor:
        positive = F.relu(self.net(x))
        total = positive.sum(-1, keepdim=True)
        if self.fixed:
            total = total + 1e-8
        return positive / total


class SilentTarget(FixPair):
    """An error is scaled by the level of the target, which is 0 for silence."""

    source = "https://github.com/crlandsc/torch-log-wmse/pull/3"
    line = r"/ level"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        level = y.pow(2).mean(-1, keepdim=True).sqrt()
        if self.fixed:
            level = level + 1e-8
        return ((self.net(x) - y[:, :6]) / level).abs().mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 8, seed=1)


class HalfQuaternion(FixPair):
    """The norm of a quaternion is clamped at 1e-12, which is 0 in float16."""

    source = "https://github.com/kornia/kornia/issues/4021"
    line = r"/ norm"
    dtypes = ("float16",)

    def forward(self, x: Tensor) -> Tensor:
        q = x + 0 * self.net(x).sum()
        eps = 1e-12
        if self.fixed:
            eps = max(eps, torch.finfo(q.dtype).tiny)
        norm = q.norm(dim=-1, keepdim=True).clamp(min=eps)
        return q / norm


class HalfZeroVector(FixPair):
    """Embeddings are normalised in float16, where the small number beside the norm is 0."""

    source = "https://github.com/MinishLab/model2vec/pull/369"
    line = r"/ \(norm"
    dtypes = ("float16",)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        norm = out.norm(dim=-1, keepdim=True)
        if self.fixed:
            return (out.float() / (norm.float() + 1e-12)).to(x.dtype)
        return out / (norm + 1e-12)


class SoftplusDeviation(FixPair):
    """A predicted deviation is a softplus, which is 0 for very negative numbers."""

    source = "https://github.com/mllam/neural-lam/pull/537"
    line = r"/ deviation"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, raw = self.net(x).chunk(2, dim=-1)
        deviation = F.softplus(raw)
        if self.fixed:
            deviation = deviation.clamp(min=1e-6)
        return (((y - mean) / deviation).abs() + deviation).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), normal(4, 3, seed=1)


class PatchNorm(FixPair):
    """The norm of a patch is compared with a small number after its root, whose slope is not."""

    source = "https://github.com/daa233/generative-inpainting-pytorch/pull/42"
    line = r"torch\.sqrt"

    def forward(self, x: Tensor) -> Tensor:
        patches = self.net(x)
        if self.fixed:
            norm = torch.sqrt((patches.pow(2) + 1e-4).sum(-1, keepdim=True))
        else:
            root = torch.sqrt(patches.pow(2).sum(-1, keepdim=True))
            norm = torch.maximum(root, torch.tensor(1e-4, dtype=x.dtype))
        return patches / norm


class SigmoidGate(FixPair):
    """A router divides the sigmoid scores of its experts by their sum, which may underflow."""

    source = "https://github.com/sgl-project/sglang/issues/31017"
    line = r"/ total"
    dtypes = ("float32", "bfloat16")

    def build(self) -> None:
        self.net = nn.Linear(32, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        score = self.net(x).float().sigmoid().topk(2, dim=-1)[0]
        total = score.sum(-1, keepdim=True)
        if self.fixed:
            total = total + 1e-20
        return score / total

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return (normal(4, 32),)


class NoEdges(FixPair):
    """A node without edges has the degree 0, which is raised to the power of -0.5."""

    source = "https://github.com/mlx-graphs/mlx-graphs/pull/18"
    line = r"pow\(-0\.5\)"

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        degree = edges.sum(1)
        if self.fixed:
            degree = torch.where(degree > 0, degree, torch.ones_like(degree))
        scale = degree.pow(-0.5)
        return (scale[:, None] * edges * scale[None, :]) @ self.net(x)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), torch.ones(4, 4)


class BoxHeight(FixPair):
    """The shape of a predicted box is the angle of its width over its height, which may be 0."""

    source = "https://github.com/pythonlessons/TensorFlow-2.x-YOLOv3/issues/144"
    line = r"w / h"

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        w, h = (boxes + F.relu(self.net(x)).mean() * 0).unbind(-1)
        if self.fixed:
            h = h.abs() + 1e-7
        return torch.atan(w / h).pow(2).mean()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return normal(4, 8), uniform(4, 2) + 0.1


class Transport(FixPair):
    """Sinkhorn's iteration divides by products with a kernel whose entries may all underflow."""

    source = "https://github.com/PythonOT/POT/issues/54"
    line = r"share /"

    def build(self) -> None:
        self.net = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        cost = self.net(x).pow(2)
        scaled = cost / 0.01
        if self.fixed:
            scaled = scaled.clamp(max=60.0)
        kernel = torch.exp(-scaled)
        share = 1.0 / x.shape[0]
        u = share / kernel.sum(-1)
        return (u[:, None] * kernel * cost).sum()

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return (0.05 * normal(4, 8),)
