"""Builds this project's models for an external timing script, as `contender.py:build`.

The script calls `build(shape)` with a dict, and trains the returned model in its own loop.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from src.common.random_streams import generator
from src.generation.decode import continue_prompts
from src.generation.sampling import Sampling
from src.model import Transformer
from src.model.architecture import ModelParts
from src.model.attention import AttentionConfig
from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig
from src.model.ffn import FeedForwardConfig
from src.model.ffn.mlp import MLPConfig
from src.model.ffn.moe import MoEConfig
from src.model.ffn.router import RouterConfig
from src.model.transformer import ModelConfig
from src.run.process_setup import set_up_memory
from src.training.loss import losses

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=None, repetition_penalty=1.0)


def build(shape: Mapping[str, Any]) -> tuple[Transformer, Any, dict[str, Any]]:
    """A model with the sizes of a shape, its loss, and further functions to time.

    Args:
        shape: arch (gqa_mlp or mlha_moe), vocab, hidden, layers, heads, seq, theta and tie; with
            gqa_mlp also kv_heads, head_dim and intermediate; with mlha_moe also rope_dim and
            nope_dim (whose sum is head_dim), v_dim (must equal head_dim), q_rank, kv_rank,
            moe_intermediate, n_routed, n_shared and top_k.

    Returns:
        The model; a function (model, inputs (B, T), targets (B, T)) that returns the mean loss; and
        routed_params, after_step, generate and cache_bytes by name.

    Raises:
        ValueError: arch is unknown, or v_dim differs from head_dim.
    """
    set_up_memory()
    parts = parts_of(shape)
    model = parts.build(
        vocab_size=shape["vocab"], generator_for=lambda name: generator(0, "init", name)
    )
    assert isinstance(model, Transformer)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    extra = {
        "routed_params": routed,
        "after_step": after_step,
        "generate": generate,
        "cache_bytes": lambda model, prompt: _cache_bytes(model),
    }
    return model, loss_of, extra


def parts_of(shape: Mapping[str, Any]) -> ModelParts:
    """Configuration of the parts for a shape; see `build`."""
    attention, ffn, head_dim = _parts(shape)
    model = ModelConfig(
        hidden_dim=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        head_dim=head_dim,
        inner_dim=shape["intermediate"],
        vocab_size=shape["vocab"],
        tie_embeddings=shape["tie"],
        norm_eps=1e-5,
        rope_theta=shape["theta"],
        init_std=0.02,
        router_init_std=None,
        residual_init="plain",
        sizes={},
    )
    return ModelParts(model=model, attention=attention, ffn=ffn, seq_len=max(512, shape["seq"]))


def _parts(shape: Mapping[str, Any]) -> tuple[AttentionConfig, FeedForwardConfig, int]:
    """Attention, feed-forward part and head_dim."""
    if shape["arch"] == "gqa_mlp":
        head_dim = shape["head_dim"]
        gqa = GQAConfig(num_kv_heads=shape["kv_heads"], rope_dim=head_dim, qk_norm=False)
        return gqa, MLPConfig(inner_dim=shape["intermediate"]), head_dim
    if shape["arch"] != "mlha_moe":
        raise ValueError(f"arch={shape['arch']}: must be one of gqa_mlp, mlha_moe")
    head_dim = shape["rope_dim"] + shape["nope_dim"]
    if shape["v_dim"] != head_dim:
        raise ValueError(f"v_dim={shape['v_dim']}: must be rope_dim + nope_dim, {head_dim}")
    mlha = MLHAConfig(
        q_latent_dim=shape["q_rank"],
        kv_latent_dim=shape["kv_rank"],
        rope_dim=shape["rope_dim"],
        num_rope_keys=1,
        # The compared implementations have these norms.
        latent_norm=True,
        qk_norm=False,
    )
    router = RouterConfig(
        balance="bias",
        bias_use="select",
        bias_target="mean_load",
        bias_rule="sign",
        bias_rate=1e-3,
        bias_center=True,
        bias_trainable=False,
        update_on="step",
        norm_eps=1e-20,
        dtype="float32",
        aux_weight=0.0,
        z_loss_weight=0.0,
    )
    moe = MoEConfig(
        inner_dim=shape["moe_intermediate"],
        num_routed=shape["n_routed"],
        num_shared=shape["n_shared"],
        top_k=shape["top_k"],
        dispatch="grouped",
        router=router,
    )
    return mlha, moe, head_dim


def loss_of(model: Any, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The mean cross-entropy in nats, computed as in a run's training step."""
    return losses(model, inputs_BT, targets_BT, z_loss_weight=0.0)["loss"]


def after_step(model: Transformer) -> None:
    """Updates the routers' biases, as a training run does after each step."""
    model.finish_batch()
    model.finish_step(applied=True)


def generate(model: Transformer, prompt_1T: Tensor, num_new: int) -> Tensor:
    """The prompt with greedily generated tokens appended, (1, T + num_new)."""
    (new,) = continue_prompts(
        model, prompt_1T.tolist(), max_new_tokens=num_new, sampling=GREEDY, seed=0
    )
    return torch.cat((prompt_1T, torch.tensor([new], device=prompt_1T.device)), dim=1)


def _cache_bytes(model: Transformer) -> int:
    """Cached bytes of one token in all layers."""
    return model.new_cache(num_padding=[0], num_slots=1).num_bytes
