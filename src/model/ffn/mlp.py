"""The dense feed-forward part.

Axes: B batch, T time, D hidden, I inner.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from src.model.dims import Dims
from src.model.ffn.base import FeedForward, FeedForwardConfig
from src.model.ffn.swiglu import SwiGLUClamp, swiglu


@dataclass(kw_only=True)
class MLPConfig(FeedForwardConfig):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def build(self, dims: Dims) -> "MLP":
        return MLP(hidden_dim=dims.hidden_dim, inner_dim=self.inner_dim, limit=self.swiglu_limit)


class MLP(FeedForward):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    residual_projections = ("down_proj",)

    def __init__(self, *, hidden_dim: int, inner_dim: int, limit: float | None = None) -> None:
        super().__init__()
        self.clamp = None if limit is None else SwiGLUClamp(limit)
        self.gate_proj = nn.Linear(hidden_dim, inner_dim, bias=False)
        self.up_proj = nn.Linear(hidden_dim, inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, hidden_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.clamp))
