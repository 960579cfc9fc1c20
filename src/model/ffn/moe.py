"""Mixture of experts: shared experts process every token, routed experts only some.

Axes: B batch, T time, D hidden, S = B * T.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from src.model.dims import Dims, check_sizes
from src.model.ffn.base import FeedForward, FeedForwardConfig
from src.model.ffn.experts import Experts
from src.model.ffn.mlp import MLP
from src.model.ffn.router import Router, RouterConfig

DISPATCHES = ("grouped", "loop")
WRITEUP_BIAS_RATE, WRITEUP_STEPS, WRITEUP_EXPERTS = 0.1, 11_000, 7


@dataclass(kw_only=True)
class MoEConfig(FeedForwardConfig):
    """DeepSeekMoE (arXiv 2401.06066) with the router of DeepSeek-V3."""

    usage_fields = ("dispatch", "router")

    num_routed: int
    """Number of routed experts."""
    num_shared: int
    """Experts that process every token, computed as one of width num_shared * inner_dim."""
    top_k: int
    """Routed experts picked for each token; at most num_routed."""
    dispatch: str
    """grouped: one product for all experts; loop: one expert after the other, the reference."""
    router: RouterConfig
    """How experts are picked and weighted, and how their load is balanced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, ("num_routed", "num_shared"))
        if self.num_routed < 1:
            raise ValueError(f"num_routed={self.num_routed}: must be at least 1")
        if self.num_shared < 0:
            raise ValueError(f"num_shared={self.num_shared}: must be at least 0")
        if not 1 <= self.top_k <= self.num_routed:
            raise ValueError(
                f"top_k={self.top_k}: must be from 1 to ffn.num_routed={self.num_routed}"
            )
        if self.dispatch not in DISPATCHES:
            raise ValueError(f"dispatch={self.dispatch}: must be one of {', '.join(DISPATCHES)}")

    def resolved(self, *, max_steps: int) -> "MoEConfig":
        if self.router.bias_rate is not None:
            return self
        rate = WRITEUP_BIAS_RATE * (WRITEUP_STEPS / max_steps) * (self.num_routed / WRITEUP_EXPERTS)
        return replace(self, router=replace(self.router, bias_rate=rate))

    def build(self, dims: Dims) -> "MixtureOfExperts":
        return MixtureOfExperts(self, dims)


class MixtureOfExperts(FeedForward):
    """`y = shared(x) + sum over the picked experts of weight * expert(x)`."""

    residual_projections = ("shared.down_proj", "experts.down_proj")

    def __init__(self, config: MoEConfig, dims: Dims) -> None:
        super().__init__()
        hidden, inner = dims.hidden_dim, config.inner_dim
        self.router = Router(
            config.router,
            hidden_dim=hidden,
            num_experts=config.num_routed,
            top_k=config.top_k,
        )
        self.experts = Experts(
            num_experts=config.num_routed,
            hidden_dim=hidden,
            inner_dim=inner,
            dispatch=config.dispatch,
            limit=config.swiglu_limit,
        )
        shared_dim = config.num_shared * inner
        limit = config.swiglu_limit
        self.shared = (
            MLP(hidden_dim=hidden, inner_dim=shared_dim, limit=limit) if shared_dim else None
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        weights_SK, picked_SK = self.router(x_SD)
        y_BTD = self.experts(x_SD, weights_SK, picked_SK).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        # The router's weights are float32 even in a model whose weights are bfloat16.
        return y_BTD.to(x_BTD.dtype)

    def extra_losses(self) -> dict[str, Tensor]:
        return self.router.take_extra_losses()

    def num_inactive_params(self) -> int:
        total = sum(parameter.numel() for parameter in self.experts.parameters())
        return total - total // self.experts.num_experts * self.router.top_k
