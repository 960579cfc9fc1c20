"""The slot of a block that attention fills.

Axes: B batch, T time, D hidden.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from src.model.dims import Dims


class Attention(nn.Module, ABC):
    """Causal self-attention.

    `residual_projections` names the Linear layers that write into the residual stream: the
    depth-scaled initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ("o_proj",)

    @abstractmethod
    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Attends within each sequence; returns (B, T, D) in the dtype of the projections.

        `rope` holds cosines and sines, (T, rope_dim) each.
        """


@dataclass(kw_only=True)
class AttentionConfig(ABC):
    """What every attention option declares."""

    rope_dim: int
    """Rotated dimensions of a head; even, at most head_dim."""

    @abstractmethod
    def check(self, dims: Dims) -> None:
        """Raises ValueError, naming field and value, where the sizes do not go together."""

    @abstractmethod
    def build(self, dims: Dims) -> Attention:
        """The module for one layer."""

    @abstractmethod
    def cache_numbers_per_token(self, dims: Dims) -> int:
        """Numbers that decoding keeps for each token and layer."""
