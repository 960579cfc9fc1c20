"""Converts a dense SwiGLU into experts that together compute the same function.

Upcycling follows He et al., arXiv 2410.07524. Experts are copies of the dense network or, if they
are narrower, of slices of it. The router starts with equal rows for all slices of one copy (the
paper's virtual groups), so that a token's picked experts form whole copies. The picked experts'
weights sum to 1, and so do the weights of the copies. Shared experts, which the paper does not
have, are further copies; each slice is divided by the number of times that it occurs in the sum.

Axes: E routed experts, I inner, F inner of the dense network, D hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from src.model.ffn.moe import MoEConfig


def check_upcycle(target: MoEConfig, *, dense_dim: int) -> int:
    """Raises ValueError, naming field and value, if experts cannot compute the dense function.

    Returns:
        The number of slices of the dense network.
    """
    if dense_dim % target.inner_dim:
        raise ValueError(
            f"inner_dim={target.inner_dim}: must divide the dense network's inner_dim={dense_dim}"
        )
    parts = dense_dim // target.inner_dim
    for field in ("num_routed", "top_k"):
        if getattr(target, field) % parts:
            raise ValueError(
                f"{field}={getattr(target, field)}: must be a multiple of {parts}, the number of"
                f" slices of inner_dim={target.inner_dim} in the dense network's {dense_dim}"
            )
    return parts


def to_experts(
    weights: Mapping[str, Tensor],
    *,
    target: MoEConfig,
    init_std: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Weights of one layer's mixture of experts.

    Args:
        weights: weights of the dense gate_proj, up_proj and down_proj, by name.
        target: configuration of the mixture.
        init_std: standard deviation of the router's rows.
        generator: random generator for the router's rows.

    Returns:
        Weights by name, float32.
    """
    gate_FD, up_FD = weights["gate_proj.weight"], weights["up_proj.weight"]
    down_DF = weights["down_proj.weight"]
    num_parts = check_upcycle(target, dense_dim=len(gate_FD))
    part_E = torch.arange(target.num_routed) % num_parts
    shared_part = torch.arange(target.num_shared) % num_parts
    # How often a slice occurs in the sum: once through routing, once for each shared copy.
    times = 1 + torch.bincount(shared_part, minlength=num_parts)

    gates, ups = (w.unflatten(0, (num_parts, -1)) for w in (gate_FD, up_FD))
    downs = down_DF.unflatten(1, (num_parts, -1)).transpose(0, 1) / times[:, None, None]
    rows = torch.empty(target.num_routed // num_parts, gate_FD.shape[1])
    rows.normal_(mean=0.0, std=init_std, generator=generator)
    found = {
        "router.weight": rows.repeat_interleave(num_parts, dim=0),
        "router.bias_E": torch.zeros(target.num_routed),
        "experts.gate_proj": gates[part_E],
        "experts.up_proj": ups[part_E],
        # The router gives each slice 1 / num_parts of its copy's weight; the factor undoes this.
        "experts.down_proj": downs[part_E] * num_parts,
    }
    if target.num_shared:
        found["shared.gate_proj.weight"] = gates[shared_part].flatten(0, 1)
        found["shared.up_proj.weight"] = ups[shared_part].flatten(0, 1)
        found["shared.down_proj.weight"] = downs[shared_part].transpose(0, 1).flatten(1)
    return {name: value.contiguous() for name, value in found.items()}
