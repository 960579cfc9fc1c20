"""The slot of a block that the feed-forward part fills.

Axes: B batch, T time, D hidden.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from src.model.dims import Dims, check_sizes


class FeedForward(nn.Module, ABC):
    """A map of each token on its own.

    `residual_projections` names the weights that write into the residual stream: the depth-scaled
    initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps each token; returns (B, T, D)."""

    def extra_losses(self) -> dict[str, Tensor]:
        """Scalars of the last forward pass that join the loss, weighted, by metric name."""
        return {}

    def num_inactive_params(self) -> int:
        """Parameters that a single token does not pass through."""
        return 0


@dataclass(kw_only=True)
class FeedForwardConfig(ABC):
    """What every feed-forward option declares."""

    usage_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say how trained weights are used, and are no part of them."""

    inner_dim: int
    """Width of the SwiGLU's inside; of one expert's, where there are experts."""

    def __post_init__(self) -> None:
        if self.inner_dim < 1:
            raise ValueError(f"inner_dim={self.inner_dim}: must be at least 1")
        check_sizes(self, ("inner_dim",))

    def resolved(self, *, max_steps: int) -> "FeedForwardConfig":
        """The same with every value filled in that depends on the length of the run."""
        return self

    @abstractmethod
    def build(self, dims: Dims) -> FeedForward:
        """The module for one layer."""
