"""The compared models of transformers, with its own modelling code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from src.model.architecture import ModelParts
from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig
from src.model.ffn.moe import MoEConfig


def transformers_model(parts: ModelParts, *, vocab_size: int) -> nn.Module:
    """A Llama for gqa+mlp, a DeepSeek-V3 for mlha+moe.

    Raises:
        ValueError: transformers has no model with these parts.
    """
    model, attention, ffn = parts.model, parts.attention, parts.ffn
    dims = model.dims()
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": dims.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": dims.num_heads,
        "intermediate_size": model.inner_dim,
        "max_position_embeddings": parts.seq_len,
        "rms_norm_eps": dims.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if isinstance(attention, GQAConfig) and not isinstance(ffn, MoEConfig):
        return LlamaForCausalLM(
            LlamaConfig(
                num_key_value_heads=attention.num_kv_heads, head_dim=dims.head_dim, **common
            )
        )
    if not isinstance(attention, MLHAConfig) or not isinstance(ffn, MoEConfig):
        raise ValueError("transformers has only gqa+mlp and mlha+moe")
    config = DeepseekV3Config(
        num_key_value_heads=dims.num_heads,
        q_lora_rank=attention.q_latent_dim,
        kv_lora_rank=attention.kv_latent_dim,
        qk_rope_head_dim=attention.rope_dim,
        qk_nope_head_dim=dims.head_dim - attention.rope_dim,
        v_head_dim=dims.head_dim,
        moe_intermediate_size=ffn.inner_dim,
        n_routed_experts=ffn.num_routed,
        n_shared_experts=ffn.num_shared,
        num_experts_per_tok=ffn.top_k,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        # Experts in every layer, and no multi-token prediction.
        first_k_dense_replace=0,
        num_mtp_layers=0,
        **common,
    )
    built = DeepseekV3ForCausalLM(config)
    built.set_experts_implementation("grouped_mm")
    return built


def transformers_loss(
    model: nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor
) -> torch.Tensor:
    """The loss that transformers computes from labels, which it shifts itself."""
    loss: torch.Tensor = model(input_ids=inputs_BT, labels=inputs_BT, use_cache=False).loss
    return loss


def transformers_decode(model: Any) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A function that continues a prompt greedily, without stopping at end tokens."""

    def decode(prompt_1T: torch.Tensor, count: int) -> torch.Tensor:
        model.eval()
        made: torch.Tensor = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
        return made

    return decode
