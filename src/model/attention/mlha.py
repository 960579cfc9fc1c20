"""Multi-head latent attention.

Axes: B batch, T time, D hidden, H heads, K head_dim, C content dimensions (K - R), R rope_dim,
L latent, G rope keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.attention.base import Attention, AttentionConfig
from src.model.dims import Dims
from src.model.norm import RMSNorm
from src.model.rope import check_rope_dim, rotate


@dataclass(kw_only=True)
class MLHAConfig(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_latent_dim: int
    """Width of the query latent."""
    kv_latent_dim: int
    """Width of the joint key-value latent, which is what decoding caches."""
    num_rope_keys: int
    """Rotated keys, each for num_heads / num_rope_keys heads; 1 in DeepSeek and the write-up."""
    latent_norm: bool
    """RMSNorm on both latents, as DeepSeek-V2 has and the write-up does not."""
    qk_norm: bool
    """RMSNorm over each query and key head before the rotation (arXiv 2302.05442)."""

    def check(self, dims: Dims) -> None:
        """See AttentionConfig."""
        check_rope_dim(self.rope_dim, head_dim=dims.head_dim)
        for field in ("q_latent_dim", "kv_latent_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.num_rope_keys < 1 or dims.num_heads % self.num_rope_keys:
            raise ValueError(
                f"num_rope_keys={self.num_rope_keys}: must divide model.num_heads={dims.num_heads}"
            )

    def build(self, dims: Dims) -> "MultiHeadLatentAttention":
        """See AttentionConfig."""
        self.check(dims)
        return MultiHeadLatentAttention(self, dims)

    def cache_numbers_per_token(self, dims: Dims) -> int:
        """The key-value latent and the rotated keys."""
        return self.kv_latent_dim + self.num_rope_keys * self.rope_dim


class MultiHeadLatentAttention(Attention):
    """Keys and values are decompressed from one latent; position enters through a rope key from x.

    A head is laid out as content first, rope last. The score scale is 1 / sqrt(head_dim).
    """

    def __init__(self, config: MLHAConfig, dims: Dims) -> None:
        super().__init__()
        heads, self.head_dim = dims.num_heads, dims.head_dim
        self.num_heads, self.rope_dim = heads, config.rope_dim
        self.content_dim = self.head_dim - self.rope_dim
        self.num_rope_keys = config.num_rope_keys
        q_latent, kv_latent, eps = config.q_latent_dim, config.kv_latent_dim, dims.norm_eps

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.q_down = linear(dims.hidden_dim, q_latent)
        self.q_up = linear(q_latent, heads * self.head_dim)
        self.kv_down = linear(dims.hidden_dim, kv_latent)
        self.k_up = linear(kv_latent, heads * self.content_dim)
        self.v_up = linear(kv_latent, heads * self.head_dim)
        self.k_rope = linear(dims.hidden_dim, self.num_rope_keys * self.rope_dim)
        self.o_proj = linear(heads * self.head_dim, dims.hidden_dim)
        self.q_latent_norm = RMSNorm(q_latent, eps=eps) if config.latent_norm else nn.Identity()
        self.kv_latent_norm = RMSNorm(kv_latent, eps=eps) if config.latent_norm else nn.Identity()
        self.q_norm = RMSNorm(self.head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """See Attention."""
        heads, keys = self.num_heads, self.num_rope_keys
        q_BHTK = _split(self.q_up(self.q_latent_norm(self.q_down(x_BTD))), heads, self.head_dim)
        latent_BTL = self.kv_latent_norm(self.kv_down(x_BTD))
        k_BHTC = _split(self.k_up(latent_BTL), heads, self.content_dim)
        v_BHTK = _split(self.v_up(latent_BTL), heads, self.head_dim)
        k_BGTR = _split(self.k_rope(x_BTD), keys, self.rope_dim)
        k_BHTR = k_BGTR.repeat_interleave(heads // keys, dim=1)
        q_BHTK = self._rotate_tail(self.q_norm(q_BHTK), rope)
        k_BHTK = self._rotate_tail(self.k_norm(torch.cat((k_BHTC, k_BHTR), dim=-1)), rope)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))

    def _rotate_tail(self, x_BHTK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        content, turning = x_BHTK.split((self.content_dim, self.rope_dim), dim=-1)
        return torch.cat((content, rotate(turning, rope)), dim=-1)


def _split(x_BTE: Tensor, num: int, dim: int) -> Tensor:
    """(B, T, num * dim) to (B, num, T, dim)."""
    return x_BTE.unflatten(-1, (num, dim)).transpose(1, 2)
