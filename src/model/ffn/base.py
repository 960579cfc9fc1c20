"""The interface of feed-forward options.

Axes: B batch, T time, D hidden.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from src.model.bounds import check_bound
from src.model.dims import Dims, check_sizes


class FeedForward(nn.Module, ABC):
    """Transforms each token independently.

    `residual_projections` names the weights that write into the residual stream: the depth-scaled
    initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transforms each token; returns (B, T, D)."""

    def extra_losses(self) -> dict[str, Tensor]:
        """Weighted scalars of the last forward pass to add to the loss, by metric name."""
        return {}

    def num_inactive_params(self) -> int:
        """Parameters that a single token does not use."""
        return 0


@dataclass(kw_only=True)
class FeedForwardConfig(ABC):
    """What every feed-forward option declares."""

    usage_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that affect how trained weights are used, but not the weights' names and shapes."""

    inner_dim: int
    """Inner width of the SwiGLU, or of each expert."""
    swiglu_limit: float | None = None
    """Bound on the two factors of the SwiGLU: gate from above, up from both sides; above 0; null:
    none."""

    def __post_init__(self) -> None:
        if self.inner_dim < 1:
            raise ValueError(f"inner_dim={self.inner_dim}: must be at least 1")
        check_sizes(self, ("inner_dim",))
        check_bound("swiglu_limit", self.swiglu_limit)

    def resolved(self, *, max_steps: int) -> "FeedForwardConfig":
        """This config with the values filled in that depend on the length of the run."""
        return self

    @abstractmethod
    def build(self, dims: Dims) -> FeedForward:
        """The module for one layer."""
