"""Grouped-query attention.

Axes: B batch, T time, D hidden, H query heads, G key-value heads, K head_dim, R rope_dim,
S slots of the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.model.attention.base import Attention, AttentionConfig
from src.model.attention.causal import attend_to_cache, scaled_dot_product_attention
from src.model.cache import Rope, Span
from src.model.dims import Dims, check_rope_dim
from src.model.norm import RMSNorm
from src.model.rope import rotate


@dataclass(kw_only=True)
class GQAConfig(AttentionConfig):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    num_kv_heads: int
    """Key-value heads; divides num_heads. With all heads it is multi-head attention."""
    qk_norm: bool
    """RMSNorm over each query and key head before the rotation (arXiv 2302.05442)."""

    def check(self, dims: Dims) -> None:
        check_rope_dim(self.rope_dim, head_dim=dims.head_dim)
        if self.num_kv_heads < 1 or dims.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide model.num_heads={dims.num_heads}"
            )

    def build(self, dims: Dims) -> "GroupedQueryAttention":
        self.check(dims)
        return GroupedQueryAttention(self, dims)

    def cache_shapes(self, dims: Dims) -> dict[str, tuple[int, int]]:
        """Caches rotated keys, and values."""
        return dict.fromkeys(("keys", "values"), (self.num_kv_heads, dims.head_dim))

    @property
    def decoding(self) -> str:
        return "keys and values"


class GroupedQueryAttention(Attention):
    """Query heads in groups that share one key-value head; the first R dimensions rotate."""

    def __init__(self, config: GQAConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.num_heads, self.num_kv_heads = dims.num_heads, config.num_kv_heads
        self.head_dim, self.rope_dim = dims.head_dim, config.rope_dim
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dims.hidden_dim, q_dim, bias=False)
        self.k_proj = nn.Linear(dims.hidden_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(dims.hidden_dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, dims.hidden_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=dims.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=dims.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD, rope)
        self._watch(q_BHTK, k_BGTK)
        y_BHTK = scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, softcap=self.softcap)
        return self.o_proj(self._gated(y_BHTK, x_BTD))

    def extend(self, x_BTD: Tensor, kept: dict[str, Tensor], span: Span) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD, span.rope)
        k_BGSK, v_BGSK = span.keep(kept["keys"], k_BGTK), span.keep(kept["values"], v_BGTK)
        y_BHTK = attend_to_cache(q_BHTK, k_BGSK, v_BGSK, mask=span.mask, softcap=self.softcap)
        return self.o_proj(self._gated(y_BHTK, x_BTD))

    @torch.no_grad()
    def scale_scores(self, factors_H: Tensor) -> None:
        """Scales a group of heads by its smallest factor, because the group shares its key head."""
        groups = self.num_kv_heads, self.num_heads // self.num_kv_heads
        roots_G11 = factors_H.unflatten(0, groups).amin(dim=1).sqrt()[:, None, None]
        for projection in (self.q_proj, self.k_proj):
            projection.weight.unflatten(0, (self.num_kv_heads, -1)).mul_(roots_G11)

    def _project(self, x_BTD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values."""
        q_BHTK = self._heads(self.q_proj(x_BTD), self.num_heads)
        k_BGTK = self._heads(self.k_proj(x_BTD), self.num_kv_heads)
        v_BGTK = self._heads(self.v_proj(x_BTD), self.num_kv_heads)
        q_BHTK = self._rotate(self.q_norm(q_BHTK), rope)
        k_BGTK = self._rotate(self.k_norm(k_BGTK), rope)
        return q_BHTK, k_BGTK, v_BGTK

    def _heads(self, x_BTE: Tensor, num_heads: int) -> Tensor:
        return x_BTE.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

    def _rotate(self, x_BHTK: Tensor, rope: Rope) -> Tensor:
        if self.rope_dim == self.head_dim:
            return rotate(x_BHTK, rope)
        turning, still = x_BHTK.split((self.rope_dim, self.head_dim - self.rope_dim), dim=-1)
        return torch.cat((rotate(turning, rope), still), dim=-1)
