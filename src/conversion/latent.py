"""Grouped-query attention into multi-head latent attention, by factorising trained projections.

After MHA2MLA (Ji et al., arXiv 2502.14837): part of the rotation is removed (section 3.1), and the
keys that no longer rotate share one low-rank factor with the values (section 3.2, joint SVD). Two
steps are ours: rope keys that several kv heads share, and the query latent. Every factor can be
the nearest for the inputs that the layer really sees (arXiv 2403.07378) instead of for all alike.

Axes: H query heads, G kv heads, K head_dim, R rotated dimensions, C = K - R content dimensions,
P = R / 2 rotated pairs, D hidden, L latent, N rope keys, M kv heads that share one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig
from src.model.dims import Dims

RIDGE = 1e-3
"""Added to the inputs' second moments, as a share of their mean: no direction counts nothing."""


@dataclass(frozen=True, kw_only=True)
class InputMetric:
    """How much an error counts by the direction of the input: |error @ root|."""

    root_DD: Tensor
    """Square root of the inputs' second moments, float64."""
    inverse_DD: Tensor

    @staticmethod
    def of(moments_DD: Tensor) -> "InputMetric":
        """From the mean of x x^T over inputs x."""
        # Of mean 1: the metric weighs directions, and leaves the size of factors alone.
        moments_DD = moments_DD.double() / moments_DD.diagonal().mean()
        ridge = RIDGE * torch.eye(len(moments_DD), dtype=torch.float64)
        values_D, vectors_DD = torch.linalg.eigh(moments_DD + ridge)
        root_D = values_D.sqrt()
        return InputMetric(
            root_DD=vectors_DD * root_D @ vectors_DD.T,
            inverse_DD=vectors_DD / root_D @ vectors_DD.T,
        )

    @staticmethod
    def even(size: int) -> "InputMetric":
        """All directions alike: errors of weights themselves."""
        eye = torch.eye(size, dtype=torch.float64)
        return InputMetric(root_DD=eye, inverse_DD=eye)


def check_latent(source: GQAConfig, target: MLHAConfig, dims: Dims, *, rope_stride: int) -> None:
    """Raises ValueError, naming field and value, where the one cannot become the other."""
    target.check(dims)
    if source.qk_norm:
        raise ValueError(
            "attention=mlha: the source has qk_norm, and a norm between projections cannot be"
            " factorised"
        )
    if rope_stride < 1:
        raise ValueError(f"rope_stride={rope_stride}: must be at least 1")
    most = 2 * len(range(0, source.rope_dim // 2, rope_stride))
    if target.rope_dim > most:
        raise ValueError(
            f"rope_dim={target.rope_dim}: must be at most {most}: of the source's"
            f" {source.rope_dim // 2} rotated pairs one in {rope_stride} (rope_stride)"
        )
    if source.num_kv_heads % target.num_rope_keys:
        raise ValueError(
            f"num_rope_keys={target.num_rope_keys}: must divide the source's"
            f" num_kv_heads={source.num_kv_heads}"
        )
    for field in ("q_latent_dim", "kv_latent_dim"):
        if getattr(target, field) > dims.hidden_dim:
            raise ValueError(
                f"{field}={getattr(target, field)}: must be at most"
                f" hidden_dim={dims.hidden_dim}; a larger latent holds nothing more"
            )


def full_kv_rank(source: GQAConfig, *, rope_dim: int, dims: Dims) -> int:
    """The kv latent with which keys and values are kept exactly."""
    rows = source.num_kv_heads * (2 * dims.head_dim - rope_dim)
    return min(rows, dims.hidden_dim)


def stretched_theta(theta: float, *, source_dim: int, rope_dim: int, rope_stride: int) -> float:
    """The base with which pair j of rope_dim turns as pair j * rope_stride of source_dim did."""
    return theta ** (rope_stride * rope_dim / source_dim)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Singular values and vectors of a matrix, (E, D), in a metric of its inputs."""

    u_EE: Tensor
    s: Tensor
    v_DD: Tensor
    """With the metric taken out again."""

    @staticmethod
    def of(matrix_ED: Tensor, *, metric: InputMetric) -> "Factors":
        """Decomposes it."""
        # All of V, from which a rank beyond the matrix's own is filled up; of U what is used.
        u_EE, s, v_DD = torch.linalg.svd(
            matrix_ED @ metric.root_DD, full_matrices=len(matrix_ED) < matrix_ED.shape[1]
        )
        return Factors(u_EE=u_EE, s=s, v_DD=v_DD @ metric.inverse_DD)

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest product (E, L) @ (L, D) in the metric, both factors of like size.

        A rank beyond the matrix's own gets rows that no output uses yet, so that they can learn.
        """
        used = min(rank, len(self.s))
        size_L = self.s.sqrt().mean().repeat(rank)
        size_L[:used] = self.s[:used].sqrt()
        up_EL = self.u_EE.new_zeros(len(self.u_EE), rank)
        up_EL[:, :used] = self.u_EE[:, :used] * size_L[:used]
        return up_EL, size_L[:, None] * self.v_DD[:rank]


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """One layer's attention, decomposed: weights of every rank follow from it."""

    kv: Factors
    """Of the joint matrix of content keys and values, (E, D)."""
    queries: Factors
    """Of the queries, content first and rotated dimensions last in each head, (H K, D)."""
    num_content_rows: int
    """Rows of the joint matrix that are keys: G C."""
    k_rope_ED: Tensor
    o_proj_DE: Tensor
    num_heads: int
    num_kv_heads: int

    def weights(self, *, q_latent_dim: int, kv_latent_dim: int) -> dict[str, Tensor]:
        """Those of latent attention, by name, float32.

        Exact at q_latent_dim = hidden_dim and the full kv rank where rope_dim is the source's and
        num_rope_keys = num_kv_heads; elsewhere each factor is the nearest of its rank.
        """
        q_up, q_down = self.queries.of_rank(q_latent_dim)
        up_EL, kv_down = self.kv.of_rank(kv_latent_dim)
        k_up_EL, v_up_EL = up_EL.tensor_split((self.num_content_rows,))
        found = {
            "q_down": q_down,
            "q_up": q_up,
            "kv_down": kv_down,
            "k_up": self._for_each_query_head(k_up_EL),
            "v_up": self._for_each_query_head(v_up_EL),
            "k_rope": self.k_rope_ED,
            "o_proj": self.o_proj_DE,
        }
        return {f"{name}.weight": value.float().contiguous() for name, value in found.items()}

    def _for_each_query_head(self, up_EL: Tensor) -> Tensor:
        each = up_EL.unflatten(0, (self.num_kv_heads, len(up_EL) // self.num_kv_heads))
        return each.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0).flatten(0, 1)


def decompose(
    weights: Mapping[str, Tensor],
    *,
    source: GQAConfig,
    dims: Dims,
    rope_dim: int,
    num_rope_keys: int,
    rope_stride: int,
    metric: InputMetric,
) -> Decomposition:
    """Decomposes the attention of one layer.

    Args:
        weights: of q_proj, k_proj, v_proj and o_proj, each (outputs, inputs), by name.
        source: what they belong to.
        dims: of the model.
        rope_dim: dimensions of a head that go on rotating.
        num_rope_keys: keys that rotate.
        rope_stride: every so manyth pair goes on rotating, from the fastest on: 1 keeps the
            fastest (MHA2MLA's high-frequency choice), the source's share its uniform one.
        metric: of the layer's inputs.
    """
    heads, kv_heads, head_dim = dims.num_heads, source.num_kv_heads, dims.head_dim
    q_HKD = weights["q_proj.weight"].double().unflatten(0, (heads, head_dim))
    k_GKD = weights["k_proj.weight"].double().unflatten(0, (kv_heads, head_dim))
    first_P = torch.arange(rope_dim // 2) * rope_stride
    turning_R = torch.cat((first_P, first_P + source.rope_dim // 2))
    still_K = torch.ones(head_dim, dtype=torch.bool)
    still_K[turning_R] = False

    k_rope_NRD, factors_GP = _share(k_GKD[:, turning_R], num=num_rope_keys, metric=metric)
    factors_HP = factors_GP.repeat_interleave(heads // kv_heads, dim=0)
    q_turning_HRD = _real(_complex(q_HKD[:, turning_R]) * factors_HP.conj().unsqueeze(-1))
    q_ED = torch.cat((q_HKD[:, still_K], q_turning_HRD), dim=1).flatten(0, 1)
    content_ED = k_GKD[:, still_K].flatten(0, 1)
    kv_ED = torch.cat((content_ED, weights["v_proj.weight"].double()))
    return Decomposition(
        kv=Factors.of(kv_ED, metric=metric),
        queries=Factors.of(q_ED, metric=metric),
        num_content_rows=len(content_ED),
        k_rope_ED=k_rope_NRD.flatten(0, 1),
        o_proj_DE=weights["o_proj.weight"],
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


def _share(k_GRD: Tensor, *, num: int, metric: InputMetric) -> tuple[Tensor, Tensor]:
    """Rope keys (N, R, D) and what each kv head's queries are multiplied by, (G, P).

    A rotation turns a pair like a complex number, so it commutes with complex factors: where head
    g's pair is nearly c_g times a shared one, q . conj(c_g k) = (q conj(c_g)) . conj(k). The shared
    pair is the first right singular vector of the heads that share it.
    """
    pairs_GPD = _complex(k_GRD)
    if num == len(pairs_GPD):
        return k_GRD, torch.ones(pairs_GPD.shape[:2], dtype=pairs_GPD.dtype)
    sharing = len(pairs_GPD) // num
    pairs_NPMD = (pairs_GPD @ metric.root_DD.to(pairs_GPD.dtype)).unflatten(0, (num, sharing))
    u_NPMM, s_NPM, v_NPMD = torch.linalg.svd(pairs_NPMD.transpose(1, 2), full_matrices=False)
    # Sized like the keys that it stands for, so that a learning rate means the same.
    scale = sharing**0.5
    factors_GP = (u_NPMM[..., 0] * scale).transpose(1, 2).flatten(0, 1)
    shared_NPD = v_NPMD[..., 0, :] * (s_NPM[..., :1] / scale)
    return _real(shared_NPD @ metric.inverse_DD.to(shared_NPD.dtype)), factors_GP


def _complex(x_HRD: Tensor) -> Tensor:
    """Half-rotation layout: dimensions j and j + P are one pair."""
    return torch.complex(*x_HRD.chunk(2, dim=1))


def _real(x_HPD: Tensor) -> Tensor:
    return torch.cat((x_HPD.real, x_HPD.imag), dim=1)
