"""The interface of attention options.

Axes: B batch, T time, D hidden, G heads of a kept tensor, S slots of the cache, K dimensions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from src.model.bounds import SoftCap, check_bound
from src.model.cache import Rope, Span
from src.model.dims import Dims


class Attention(nn.Module, ABC):
    """Causal self-attention.

    `residual_projections` names the Linear layers that write into the residual stream: the
    depth-scaled initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ("o_proj",)

    def __init__(self, config: "AttentionConfig") -> None:
        super().__init__()
        self.softcap = None if config.softcap is None else SoftCap(config.softcap)

    @abstractmethod
    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """Attends within each sequence; returns (B, T, D) in the dtype of the projections.

        Args:
            x_BTD: the normalised residual stream.
            rope: cosines and sines, (T, rope_dim) each.
        """

    @abstractmethod
    def extend(self, x_BTD: Tensor, kept: dict[str, Tensor], span: Span) -> Tensor:
        """As `forward`, for tokens that follow cached ones; equal to it over the whole sequence.

        Args:
            x_BTD: the normalised residual stream of the new tokens.
            kept: the layer's cached tensors, (B, G, S, K) each; the new tokens are added to them.
            span: slots, rotations and mask of the new tokens.
        """


@dataclass(kw_only=True)
class AttentionConfig(ABC):
    """What every attention option declares."""

    rope_dim: int
    """Rotated dimensions of a head; even, at most head_dim."""
    softcap: float | None = None
    """Bound of a soft-cap on the attention scores (arXiv 2408.00118); above 0; null: none."""

    def __post_init__(self) -> None:
        check_bound("softcap", self.softcap)

    @abstractmethod
    def check(self, dims: Dims) -> None:
        """Raises ValueError, naming field and value, if the sizes do not fit together."""

    @abstractmethod
    def build(self, dims: Dims) -> Attention:
        """The module for one layer."""

    @abstractmethod
    def cache_shapes(self, dims: Dims) -> dict[str, tuple[int, int]]:
        """Heads and dimensions of each tensor that decoding caches in a layer, by name."""

    @property
    @abstractmethod
    def decoding(self) -> str:
        """How decoding attends to the cache, in a few words."""
