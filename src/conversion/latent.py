"""Converts grouped-query to multi-head latent attention by factorising trained projections.

Follows MHA2MLA (Ji et al., arXiv 2502.14837): part of the rotation is removed (section 3.1), and
keys that no longer rotate share one low-rank factor with the values (section 3.2, joint SVD). Two
steps are additions of this project: rope keys that several kv heads share, and the query latent.
Every factor can be fitted to the inputs that the layer really sees (arXiv 2403.07378) instead of
weighting all directions alike.

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
"""Added to the inputs' second moments, as a share of their mean, so that all of them count."""


@dataclass(frozen=True, kw_only=True)
class InputMetric:
    """Measures errors of a projection by |error @ root|: common input directions count more."""

    root_DD: Tensor
    """Matrix square root of the inputs' second moments, float64."""
    inverse_DD: Tensor

    @staticmethod
    def of(moments_DD: Tensor) -> "InputMetric":
        """The metric for inputs x whose mean of x x^T is given."""
        # Normalised to mean 1, so that the metric does not change the size of the factors.
        moments_DD = moments_DD.double() / moments_DD.diagonal().mean()
        ridge = RIDGE * torch.eye(len(moments_DD), dtype=torch.float64)
        values_D, vectors_DD = torch.linalg.eigh(moments_DD + ridge)
        root_D = values_D.sqrt()
        return InputMetric(
            root_DD=vectors_DD * root_D @ vectors_DD.T,
            inverse_DD=vectors_DD / root_D @ vectors_DD.T,
        )

    @staticmethod
    def identity(size: int) -> "InputMetric":
        """The metric in which all directions count alike."""
        eye = torch.eye(size, dtype=torch.float64)
        return InputMetric(root_DD=eye, inverse_DD=eye)


def check_latent(source: GQAConfig, target: MLHAConfig, dims: Dims, *, rope_stride: int) -> None:
    """Raises ValueError, naming field and value, if the conversion is not possible."""
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
            f"rope_dim={target.rope_dim}: must be at most {most}, because rope_stride={rope_stride}"
            f" keeps one in {rope_stride} of the source's {source.rope_dim // 2} rotated pairs"
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
                f" hidden_dim={dims.hidden_dim}; a larger latent adds nothing"
            )


def full_kv_rank(source: GQAConfig, *, rope_dim: int, dims: Dims) -> int:
    """The smallest kv_latent_dim that represents keys and values exactly."""
    rows = source.num_kv_heads * (2 * dims.head_dim - rope_dim)
    return min(rows, dims.hidden_dim)


def stretched_theta(theta: float, *, source_dim: int, rope_dim: int, rope_stride: int) -> float:
    """The rope base with which the target's pair j turns like the source's pair j * rope_stride."""
    return theta ** (rope_stride * rope_dim / source_dim)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Singular value decomposition of a matrix, (E, D), under a metric of its inputs."""

    u_EE: Tensor
    s: Tensor
    v_DD: Tensor
    """Right singular vectors, multiplied by the inverse of the metric."""

    @staticmethod
    def of(matrix_ED: Tensor, *, metric: InputMetric) -> "Factors":
        """Decomposes a matrix."""
        # of_rank needs all of V, to fill up ranks beyond that of the matrix.
        u_EE, s, v_DD = torch.linalg.svd(
            matrix_ED @ metric.root_DD, full_matrices=len(matrix_ED) < matrix_ED.shape[1]
        )
        return Factors(u_EE=u_EE, s=s, v_DD=v_DD @ metric.inverse_DD)

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The closest product (E, L) @ (L, D) under the metric, with factors of similar size.

        Beyond the rank of the matrix, the second factor gets rows that no output uses yet, which
        training can use.
        """
        used = min(rank, len(self.s))
        size_L = self.s.sqrt().mean().repeat(rank)
        size_L[:used] = self.s[:used].sqrt()
        up_EL = self.u_EE.new_zeros(len(self.u_EE), rank)
        up_EL[:, :used] = self.u_EE[:, :used] * size_L[:used]
        return up_EL, size_L[:, None] * self.v_DD[:rank]


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The decomposed attention of one layer, from which weights of any rank follow."""

    kv: Factors
    """Factors of the joint matrix of content keys and values, (E, D)."""
    queries: Factors
    """Factors of the queries, (H K, D); in each head, content dimensions come first."""
    num_content_rows: int
    """Rows of the joint matrix that belong to keys: G * C."""
    k_rope_ED: Tensor
    o_proj_DE: Tensor
    num_heads: int
    num_kv_heads: int

    def weights(self, *, q_latent_dim: int, kv_latent_dim: int) -> dict[str, Tensor]:
        """Weights of latent attention, by name, float32.

        They are exact if q_latent_dim = hidden_dim, kv_latent_dim is the full rank, rope_dim is
        unchanged, and num_rope_keys = num_kv_heads. Otherwise each factor is the best of its rank.
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
        weights: weights of q_proj, k_proj, v_proj and o_proj, each (outputs, inputs), by name.
        source: configuration of the source's attention.
        dims: sizes of the model.
        rope_dim: dimensions of a head that keep rotating.
        num_rope_keys: number of rope keys.
        rope_stride: one in rope_stride pairs keeps rotating, starting from the fastest. 1 keeps the
            fastest pairs (MHA2MLA's high-frequency choice); larger values spread them evenly.
        metric: metric of the layer's inputs.
    """
    heads, kv_heads, head_dim = dims.num_heads, source.num_kv_heads, dims.head_dim
    q_HKD = weights["q_proj.weight"].double().unflatten(0, (heads, head_dim))
    k_GKD = weights["k_proj.weight"].double().unflatten(0, (kv_heads, head_dim))
    first_P = torch.arange(rope_dim // 2) * rope_stride
    rotated_R = torch.cat((first_P, first_P + source.rope_dim // 2))
    content_K = torch.ones(head_dim, dtype=torch.bool)
    content_K[rotated_R] = False

    k_rope_NRD, factors_GP = _shared_rope_keys(
        k_GKD[:, rotated_R], num=num_rope_keys, metric=metric
    )
    factors_HP = factors_GP.repeat_interleave(heads // kv_heads, dim=0)
    q_rotated_HRD = _real(_complex(q_HKD[:, rotated_R]) * factors_HP.conj().unsqueeze(-1))
    q_ED = torch.cat((q_HKD[:, content_K], q_rotated_HRD), dim=1).flatten(0, 1)
    content_ED = k_GKD[:, content_K].flatten(0, 1)
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


def _shared_rope_keys(k_GRD: Tensor, *, num: int, metric: InputMetric) -> tuple[Tensor, Tensor]:
    """Rope keys (N, R, D), and complex factors (G, P) for the queries of each kv head.

    A rotated pair behaves like a complex number, so rotations commute with complex factors. If the
    pair of head g is nearly c_g times a shared pair k, then q . conj(c_g k) = (q conj(c_g)) .
    conj(k). The shared pair is the first right singular vector of the heads that share it.
    """
    pairs_GPD = _complex(k_GRD)
    if num == len(pairs_GPD):
        return k_GRD, torch.ones(pairs_GPD.shape[:2], dtype=pairs_GPD.dtype)
    sharing = len(pairs_GPD) // num
    pairs_NPMD = (pairs_GPD @ metric.root_DD.to(pairs_GPD.dtype)).unflatten(0, (num, sharing))
    u_NPMM, s_NPM, v_NPMD = torch.linalg.svd(pairs_NPMD.transpose(1, 2), full_matrices=False)
    # Scaled like the keys that it replaces, so that a learning rate has the same effect.
    scale = sharing**0.5
    factors_GP = (u_NPMM[..., 0] * scale).transpose(1, 2).flatten(0, 1)
    shared_NPD = v_NPMD[..., 0, :] * (s_NPM[..., :1] / scale)
    return _real(shared_NPD @ metric.inverse_DD.to(shared_NPD.dtype)), factors_GP


def _complex(x_HRD: Tensor) -> Tensor:
    """Pairs as complex numbers; in the half-rotation layout, dimensions j and j + P are a pair."""
    return torch.complex(*x_HRD.chunk(2, dim=1))


def _real(x_HPD: Tensor) -> Tensor:
    return torch.cat((x_HPD.real, x_HPD.imag), dim=1)
