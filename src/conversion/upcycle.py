"""A dense SwiGLU into experts that together are the same function.

Upcycling after He et al., arXiv 2410.07524: experts are copies of the dense network, or, where
they are narrower, of its parts, and the router begins with equal rows for the parts of one copy
(their virtual groups), so that a token's picked experts make whole copies. The weights of the
picked sum to 1, so the copies do. Shared experts, which that paper has none of, are further copies:
each part's weight is divided by the number of times that it stands in the sum.

Axes: E routed experts, I inner, F inner of the dense network, D hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from src.model.ffn.moe import MoEConfig


def check_upcycle(target: MoEConfig, *, dense_dim: int) -> int:
    """Raises ValueError, naming field and value, where the sum could not be the dense function.

    Returns:
        The parts that the dense network is cut into.
    """
    if dense_dim % target.inner_dim:
        raise ValueError(
            f"inner_dim={target.inner_dim}: must divide the {dense_dim} of the dense network"
        )
    parts = dense_dim // target.inner_dim
    for field in ("num_routed", "top_k"):
        if getattr(target, field) % parts:
            raise ValueError(
                f"{field}={getattr(target, field)}: must be a multiple of {parts}, the parts of"
                f" inner_dim={target.inner_dim} that the dense {dense_dim} are cut into"
            )
    return parts


def to_experts(
    weights: Mapping[str, Tensor],
    *,
    target: MoEConfig,
    init_std: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The weights of one layer's mixture.

    Args:
        weights: of gate_proj, up_proj and down_proj, by name.
        target: what comes out.
        init_std: standard deviation of the router's rows.
        generator: that draws them.

    Returns:
        Weights by name, float32.
    """
    gate_FD, up_FD = weights["gate_proj.weight"], weights["up_proj.weight"]
    down_DF = weights["down_proj.weight"]
    num_parts = check_upcycle(target, dense_dim=len(gate_FD))
    part_E = torch.arange(target.num_routed) % num_parts
    shared_part = torch.arange(target.num_shared) % num_parts
    # How often a part stands in the sum: once routed, and as often as it is shared.
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
        # A whole copy's parts share its weight evenly.
        "experts.down_proj": downs[part_E] * num_parts,
    }
    if target.num_shared:
        found["shared.gate_proj.weight"] = gates[shared_part].flatten(0, 1)
        found["shared.up_proj.weight"] = ups[shared_part].flatten(0, 1)
        found["shared.down_proj.weight"] = downs[shared_part].transpose(0, 1).flatten(1)
    return {name: value.contiguous() for name, value in found.items()}
