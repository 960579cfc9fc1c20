"""Multi-head latent attention.

Axes: B batch, T time, D hidden, H heads, K head_dim, C content dimensions (K - R), R rope_dim,
L latent, G rope keys, S slots of the cache.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.model.attention.base import Attention, AttentionConfig
from src.model.attention.causal import attend_to_cache, scaled_dot_product_attention
from src.model.cache import Rope, Span
from src.model.dims import Dims, check_rope_dim, check_sizes
from src.model.norm import RMSNorm
from src.model.rope import rotate


@dataclass(kw_only=True)
class MLHAConfig(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_latent_dim: int
    """Width of the query latent."""
    kv_latent_dim: int
    """Width of the joint key-value latent, which is what decoding caches."""
    num_rope_keys: int
    """Rotated keys, each shared by num_heads / num_rope_keys heads; DeepSeek has 1."""
    latent_norm: bool
    """RMSNorm on both latents, as in DeepSeek-V2 but not in the write-up."""
    qk_norm: bool
    """RMSNorm over each query and key head before the rotation (arXiv 2302.05442)."""

    def check(self, dims: Dims) -> None:
        check_rope_dim(self.rope_dim, head_dim=dims.head_dim)
        for field in ("q_latent_dim", "kv_latent_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        check_sizes(self, ("q_latent_dim", "kv_latent_dim"))
        if self.num_rope_keys < 1 or dims.num_heads % self.num_rope_keys:
            raise ValueError(
                f"num_rope_keys={self.num_rope_keys}: must divide model.num_heads={dims.num_heads}"
            )

    def build(self, dims: Dims) -> "MultiHeadLatentAttention":
        self.check(dims)
        return MultiHeadLatentAttention(self, dims)

    def cache_shapes(self, dims: Dims) -> dict[str, tuple[int, int]]:
        """Caches the key-value latent and the rope keys; these are unrotated with qk_norm."""
        return {
            "latents": (1, self.kv_latent_dim),
            "rope_keys": (self.num_rope_keys, self.rope_dim),
        }

    @property
    def decoding(self) -> str:
        if self.qk_norm:
            return "latents, un-absorbed: qk_norm on every head's key cannot be absorbed"
        return "latents, absorbed projections"


class MultiHeadLatentAttention(Attention):
    """Keys and values come from one latent; positions enter through separate rope keys.

    In a head, content dimensions come first and rotated ones last. The score scale is 1 / sqrt(K).
    """

    def __init__(self, config: MLHAConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        heads, self.head_dim = dims.num_heads, dims.head_dim
        self.num_heads, self.rope_dim = heads, config.rope_dim
        self.content_dim = self.head_dim - self.rope_dim
        self.num_rope_keys = config.num_rope_keys
        q_latent, kv_latent, eps = config.q_latent_dim, config.kv_latent_dim, dims.norm_eps

        def linear(inputs: int, outputs: int) -> nn.Linear:
            with warnings.catch_warnings():
                # With rope_dim = head_dim, heads have no content dimensions and k_up is empty.
                warnings.filterwarnings("ignore", message="Initializing zero-element")
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
        self.qk_norm = config.qk_norm

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        q_BHTK = self._rotate_tail(self._queries(x_BTD), rope)
        latent_BTL, k_BGTR = self._compress(x_BTD, rope)
        k_BHTK, v_BHTK = self._decompress(latent_BTL, k_BGTR, rope)
        self._watch(q_BHTK, k_BHTK)
        y_BHTK = scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, softcap=self.softcap)
        return self.o_proj(self._gated(y_BHTK, x_BTD))

    def extend(self, x_BTD: Tensor, kept: dict[str, Tensor], span: Span) -> Tensor:
        q_BHTK = self._rotate_tail(self._queries(x_BTD), span.rope)
        latent_BTL, k_BGTR = self._compress(x_BTD, span.rope)
        latent_B1SL = span.keep(kept["latents"], latent_BTL.unsqueeze(1))
        k_BGSR = span.keep(kept["rope_keys"], k_BGTR)
        if self.qk_norm:
            k_BHSK, v_BHSK = self._decompress(latent_B1SL.squeeze(1), k_BGSR, span.rope_before)
            y_BHTK = attend_to_cache(q_BHTK, k_BHSK, v_BHSK, mask=span.mask, softcap=self.softcap)
        else:
            y_BHTK = self._attend_absorbed(q_BHTK, latent_B1SL, k_BGSR, span.mask)
        return self.o_proj(self._gated(y_BHTK, x_BTD))

    @torch.no_grad()
    def scale_scores(self, factors_H: Tensor) -> None:
        """Scales each head by itself, although heads share rope keys.

        Content parts of queries and keys get the root of the factor each; rotated parts of queries
        get the whole factor, and the shared rope keys stay.
        """
        factors_H11 = factors_H[:, None, None]
        up_HKL = self.q_up.weight.unflatten(0, (self.num_heads, self.head_dim))
        up_HKL[:, : self.content_dim] *= factors_H11.sqrt()
        up_HKL[:, self.content_dim :] *= factors_H11
        if self.content_dim:
            self.k_up.weight.unflatten(0, (self.num_heads, -1)).mul_(factors_H11.sqrt())

    def _queries(self, x_BTD: Tensor) -> Tensor:
        latent_BTL = self.q_latent_norm(self.q_down(x_BTD))
        return self.q_norm(_split(self.q_up(latent_BTL), self.num_heads, self.head_dim))

    def _compress(self, x_BTD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """The key-value latent (B, T, L) and the rope keys (B, G, T, R).

        With qk_norm the rope keys are not rotated yet, because the norm of whole keys comes first.
        """
        latent_BTL = self.kv_latent_norm(self.kv_down(x_BTD))
        k_BGTR = _split(self.k_rope(x_BTD), self.num_rope_keys, self.rope_dim)
        return latent_BTL, k_BGTR if self.qk_norm else rotate(k_BGTR, rope)

    def _decompress(self, latent_BTL: Tensor, k_BGTR: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, (B, H, T, K) each, from the output of `_compress`."""
        k_BHTC = _split(self.k_up(latent_BTL), self.num_heads, self.content_dim)
        v_BHTK = _split(self.v_up(latent_BTL), self.num_heads, self.head_dim)
        k_BHTR = _repeat_heads(k_BGTR, self.num_heads // self.num_rope_keys)
        k_BHTK = torch.cat((k_BHTC, k_BHTR), dim=-1)
        if self.qk_norm:
            k_BHTK = self._rotate_tail(self.k_norm(k_BHTK), rope)
        return k_BHTK, v_BHTK

    def _attend_absorbed(
        self, q_BHTK: Tensor, latent_B1SL: Tensor, k_BGSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attends to the latents directly (arXiv 2405.04434, section 2.1.2).

        `q . (W_k latent)` is `(q W_k) . latent`, and a weighted sum of `W_v latent` is `W_v` times
        the weighted sum, so that no keys or values need to be computed.
        """
        q_BHTC, q_BHTR = q_BHTK.split((self.content_dim, self.rope_dim), dim=-1)
        k_up_HCL = self.k_up.weight.unflatten(0, (self.num_heads, self.content_dim))
        v_up_HKL = self.v_up.weight.unflatten(0, (self.num_heads, self.head_dim))
        # All heads attend to the same latents, and a group of heads to the same rope keys. Heads
        # that share a key become more queries of one head, so that no key is copied.
        content = _as_queries(q_BHTC @ k_up_HCL, 1) @ latent_B1SL.transpose(2, 3)
        turned = _as_queries(q_BHTR, self.num_rope_keys) @ k_BGSR.transpose(2, 3)
        scores_BHTS = content.view(*q_BHTK.shape[:3], -1) + turned.view(*q_BHTK.shape[:3], -1)
        scores_BHTS *= self.head_dim**-0.5
        if self.softcap is not None:
            scores_BHTS = self.softcap(scores_BHTS)
        if mask is not None:
            scores_BHTS.masked_fill_(~mask, -torch.inf)
        mixed_BHTL = _as_queries(scores_BHTS.softmax(dim=-1), 1) @ latent_B1SL
        return mixed_BHTL.view(*q_BHTK.shape[:3], -1) @ v_up_HKL.transpose(1, 2)

    def _rotate_tail(self, x_BHTK: Tensor, rope: Rope) -> Tensor:
        content, turning = x_BHTK.split((self.content_dim, self.rope_dim), dim=-1)
        return torch.cat((content, rotate(turning, rope)), dim=-1)


def _split(x_BTE: Tensor, num: int, dim: int) -> Tensor:
    """(B, T, num * dim) to (B, num, T, dim)."""
    return x_BTE.unflatten(-1, (num, dim)).transpose(1, 2)


def _repeat_heads(x_BGTR: Tensor, times: int) -> Tensor:
    """Repeats each head: (B, G, T, R) to (B, G * times, T, R), without a copy if G is 1."""
    return x_BGTR.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def _as_queries(x_BHTK: Tensor, num: int) -> Tensor:
    """(B, H, T, K) to (B, num, H / num * T, K): joins the queries of heads that share a key."""
    return x_BHTK.reshape(x_BHTK.shape[0], num, -1, x_BHTK.shape[-1])
