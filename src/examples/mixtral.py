"""A mixture of experts out of transformers, whose gates the instruments read.

python -m src.train model=external model.target=src.examples.mixtral:build preset=smoke
"""

from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from nonfinite import expose_router


class Mixtral(nn.Module):
    """Gives logits, and beside them the loss by which Mixtral balances its experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.model = MixtralForCausalLM(config)
        self._router_logits: tuple[Tensor, ...] = ()
        for module in self.modules():
            if isinstance(module, MixtralTopKRouter):
                # Its output: logits (S, E), weights and numbers (S, K) of the picked experts.
                expose_router(module, num_experts=module.num_experts, read=lambda out: out[::2])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        output = self.model(tokens_BT, use_cache=False, output_router_logits=True)
        self._router_logits = output.router_logits
        return output.logits

    def extra_losses(self) -> dict[str, Tensor]:
        """Switch Transformer's balancing loss (arXiv 2101.03961, eq. 4-6), weighted."""
        config = self.model.config
        loss = load_balancing_loss_func(
            self._router_logits,  # type: ignore[arg-type]
            config.num_local_experts,
            config.num_experts_per_tok,
        )
        assert isinstance(loss, Tensor)
        return {"router_balance": config.router_aux_loss_coef * loss}

    def num_inactive_params(self) -> int:
        """Parameters of the experts that a token is not sent to."""
        config = self.model.config
        in_experts = sum(p.numel() for n, p in self.named_parameters() if ".experts." in n)
        return in_experts - in_experts * config.num_experts_per_tok // config.num_local_experts


def build(
    *,
    vocab_size: int,
    max_seq_len: int,
    hidden_dim: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    inner_dim: int = 96,
    num_experts: int = 4,
    top_k: int = 2,
) -> nn.Module:
    """A small one, initialised as transformers does it."""
    return Mixtral(
        MixtralConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_seq_len,
            hidden_size=hidden_dim,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=inner_dim,
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
    )
