"""The interface of attention options.

Axes: B batch, T time, D hidden, H query heads, G heads of a kept tensor, S slots of the cache,
K dimensions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.model.attention.capped import causal_mask
from src.model.attention.gate import OutputGate
from src.model.bounds import SoftCap, check_bound
from src.model.cache import Rope, Span
from src.model.dims import Dims

LOWEST = torch.finfo(torch.float32).min
"""Below every score, but not infinite, which a search for non-finite numbers would find."""


class Attention(nn.Module, ABC):
    """Causal self-attention.

    `residual_projections` names the Linear layers that write into the residual stream: the
    depth-scaled initialisation shrinks those.
    """

    residual_projections: tuple[str, ...] = ("o_proj",)

    num_heads: int
    peaks_H: Tensor | None
    """The largest score of each query head in training; None unless `watch_scores` was called."""

    def __init__(self, config: "AttentionConfig", dims: Dims) -> None:
        super().__init__()
        heads_dim = dims.num_heads * dims.head_dim
        self.gate_proj = (
            OutputGate(hidden_dim=dims.hidden_dim, heads_dim=heads_dim) if config.gated else None
        )
        self.softcap = None if config.softcap is None else SoftCap(config.softcap)
        self.register_buffer("peaks_H", None, persistent=False)

    def watch_scores(self) -> None:
        """Lets training keep the largest score of each head, and forgets those kept so far."""
        device = next(self.parameters()).device
        self.peaks_H = torch.full((self.num_heads,), LOWEST, device=device)

    @abstractmethod
    def scale_scores(self, factors_H: Tensor) -> None:
        """Changes the weights of queries and keys so that each head's scores shrink.

        Queries and keys get the square root of the factor each. Where heads share weights, the
        docstring of the option says what is scaled.

        Args:
            factors_H: the factor on the scores of each query head.
        """

    def _gated(self, y_BHTK: Tensor, x_BTD: Tensor) -> Tensor:
        """The outputs of all heads, joined and gated, (B, T, H * K): the input of `o_proj`."""
        y_BTE = y_BHTK.transpose(1, 2).flatten(2)
        return y_BTE if self.gate_proj is None else self.gate_proj(y_BTE, x_BTD)

    @torch.no_grad()
    def _watch(self, query_BHTK: Tensor, key_BGTK: Tensor) -> None:
        """Keeps the largest score of each head; called with what is attended to in training."""
        if self.peaks_H is None or not self.training:
            return
        with torch.autocast(query_BHTK.device.type, enabled=False):
            num_sharing = query_BHTK.shape[1] // key_BGTK.shape[1]
            keys_BHTK = key_BGTK.float().repeat_interleave(num_sharing, dim=1)
            scores_BHTT = query_BHTK.float() @ keys_BHTK.transpose(2, 3)
        seen_TT = causal_mask(query_BHTK.shape[2], device=query_BHTK.device)
        scores_BHTT *= query_BHTK.shape[-1] ** -0.5
        peaks_H = scores_BHTT.masked_fill(~seen_TT, LOWEST).amax(dim=(0, 2, 3))
        self.peaks_H.copy_(torch.maximum(self.peaks_H, peaks_H))

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

    gated: bool = False
    """Gate each head's output by the layer's input (arXiv 2505.06708), which adds a projection."""

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
