"""Small parts for tests, without Hydra."""

from typing import Any

import torch

from src.common.random_streams import generator
from src.model import ModelConfig, Transformer, build_model
from src.model.attention import AttentionConfig
from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig
from src.model.dims import Dims
from src.model.ffn import FeedForwardConfig
from src.model.ffn.mlp import MLPConfig
from src.model.ffn.moe import MoEConfig
from src.model.ffn.router import RouterConfig

DIMS = Dims(hidden_dim=24, num_heads=4, head_dim=10, norm_eps=1e-6)
VOCAB = 29


def router_config(**changes: Any) -> RouterConfig:
    values: dict[str, Any] = {
        "balance": "bias",
        "bias_use": "select",
        "bias_target": "mean_load",
        "bias_rule": "sign",
        "bias_rate": 1e-3,
        "bias_center": True,
        "bias_trainable": False,
        "update_on": "step",
        "norm_eps": 1e-20,
        "dtype": "float32",
        "aux_weight": 1e-2,
        "z_loss_weight": 0.0,
    }
    return RouterConfig(**(values | changes))


def moe_config(*, router: RouterConfig | None = None, **changes: Any) -> MoEConfig:
    values: dict[str, Any] = {
        "inner_dim": 16,
        "num_routed": 5,
        "num_shared": 1,
        "top_k": 2,
        "dispatch": "grouped",
    }
    return MoEConfig(router=router or router_config(), **(values | changes))


def gqa_config(**changes: Any) -> GQAConfig:
    values: dict[str, Any] = {"rope_dim": 10, "num_kv_heads": 2, "qk_norm": False}
    return GQAConfig(**(values | changes))


def mlha_config(**changes: Any) -> MLHAConfig:
    values: dict[str, Any] = {
        "rope_dim": 4,
        "q_latent_dim": 12,
        "kv_latent_dim": 8,
        "num_rope_keys": 1,
        "latent_norm": False,
        "qk_norm": False,
    }
    return MLHAConfig(**(values | changes))


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "hidden_dim": DIMS.hidden_dim,
        "num_layers": 2,
        "num_heads": DIMS.num_heads,
        "head_dim": DIMS.head_dim,
        "inner_dim": 32,
        "vocab_size": VOCAB,
        "tie_embeddings": True,
        "norm_eps": DIMS.norm_eps,
        "rope_theta": 10000.0,
        "init_std": 0.1,
        "router_init_std": None,
        "residual_init": "plain",
        "sizes": {},
    }
    return ModelConfig(**(values | changes))


def transformer(
    *,
    attention: AttentionConfig | None = None,
    ffn: FeedForwardConfig | None = None,
    model: ModelConfig | None = None,
    seed: int = 0,
    max_seq_len: int = 16,
    vocab_size: int = VOCAB,
) -> Transformer:
    return build_model(
        model=model or model_config(),
        attention=attention or mlha_config(),
        ffn=ffn or moe_config(),
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        generator_for=lambda name: generator(seed, "init", name),
    )


def tokens(batch: int = 3, time: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


ATTENTION_CASES = {
    "gqa": gqa_config(),
    "gqa-multi-head": gqa_config(num_kv_heads=4),
    "gqa-part-rotated": gqa_config(rope_dim=6),
    "gqa-qk-norm": gqa_config(qk_norm=True),
    "mlha": mlha_config(),
    "mlha-latent-norm": mlha_config(latent_norm=True),
    "mlha-qk-norm": mlha_config(qk_norm=True),
    "mlha-rope-keys": mlha_config(num_rope_keys=2),
    "gqa-gated": gqa_config(gated=True),
    "mlha-gated": mlha_config(gated=True),
    "gqa-softcap": gqa_config(softcap=0.5),
    "mlha-softcap": mlha_config(softcap=0.5),
    "mlha-qk-norm-softcap": mlha_config(qk_norm=True, softcap=0.5),
}

FFN_CASES = {
    "mlp": MLPConfig(inner_dim=32),
    "moe": moe_config(),
    "moe-loop": moe_config(dispatch="loop"),
    "moe-no-shared": moe_config(num_shared=0),
    "moe-aux": moe_config(router=router_config(balance="aux")),
    "moe-none": moe_config(router=router_config(balance="none")),
    "mlp-clamp": MLPConfig(inner_dim=32, swiglu_limit=0.05),
    "moe-clamp": moe_config(swiglu_limit=0.05),
    "moe-loop-clamp": moe_config(dispatch="loop", swiglu_limit=0.05),
    "moe-softcap": moe_config(router=router_config(softcap=0.5)),
}
