"""The slot of a block that attention fills.

Axes: B batch, T time, D hidden, G heads of a kept tensor, S slots of the cache, K dimensions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from src.model.cache import Rope, Span
from src.model.dims import Dims


class Attention(nn.Module, ABC):
    """Causal self-attention.

    `residual_projections` names the Linear layers that write into the residual stream: the
    depth-scaled initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ("o_proj",)

    @abstractmethod
    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """Attends within each sequence; returns (B, T, D) in the dtype of the projections.

        `rope` holds cosines and sines, (T, rope_dim) each.
        """

    @abstractmethod
    def extend(self, x_BTD: Tensor, kept: dict[str, Tensor], span: Span) -> Tensor:
        """The same for tokens that follow others; what those left stands in `kept`, (B, G, S, K).

        Leaves there what the new tokens add. Equal to `forward` over the whole sequence.
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
    def cache_shapes(self, dims: Dims) -> dict[str, tuple[int, int]]:
        """Heads and dimensions of what decoding keeps of a token in a layer, by name."""

    @property
    @abstractmethod
    def decoding(self) -> str:
        """How decoding attends, in a few words."""
