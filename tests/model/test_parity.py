"""Our parts against the implementations that everybody trusts, on small random weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from src.model.ffn.mlp import MLPConfig
from tests.builders import (
    DIMS,
    VOCAB,
    gqa_config,
    mlha_config,
    model_config,
    moe_config,
    tokens,
    transformer,
)

# The bound of 1e-5 in float32 is ours; values are of order 1, so it is absolute and relative.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": DIMS.hidden_dim,
    "num_hidden_layers": 2,
    "num_attention_heads": DIMS.num_heads,
    "max_position_embeddings": 64,
    "rms_norm_eps": DIMS.norm_eps,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        intermediate_size=32, num_key_value_heads=2, head_dim=DIMS.head_dim, **COMMON
    )
    return LlamaForCausalLM(config)


def deepseek() -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        intermediate_size=32,
        moe_intermediate_size=16,
        num_key_value_heads=DIMS.num_heads,
        n_routed_experts=5,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=DIMS.head_dim,
        rope_interleave=False,
        **COMMON,
    )
    return DeepseekV3ForCausalLM(config)


def copy_attention(theirs, ours) -> None:
    if hasattr(ours, "q_proj"):
        pairs = [(getattr(theirs, n), getattr(ours, n)) for n in ("q_proj", "k_proj", "v_proj")]
        for source, target in pairs:
            target.weight.copy_(source.weight)
    else:
        ours.q_down.weight.copy_(theirs.q_a_proj.weight)
        ours.q_up.weight.copy_(theirs.q_b_proj.weight)
        down, rope = theirs.kv_a_proj_with_mqa.weight.split((8, 4))
        ours.kv_down.weight.copy_(down)
        ours.k_rope.weight.copy_(rope)
        keys, values = theirs.kv_b_proj.weight.unflatten(0, (DIMS.num_heads, 16)).split((6, 10), 1)
        ours.k_up.weight.copy_(keys.flatten(0, 1))
        ours.v_up.weight.copy_(values.flatten(0, 1))
        ours.q_latent_norm.weight.copy_(theirs.q_a_layernorm.weight)
        ours.kv_latent_norm.weight.copy_(theirs.kv_a_layernorm.weight)
    ours.o_proj.weight.copy_(theirs.o_proj.weight)


def copy_mlp(theirs, ours) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(ours, name).weight.copy_(getattr(theirs, name).weight)


def copy_moe(theirs, ours) -> None:
    gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
    ours.experts.gate_proj.copy_(gate)
    ours.experts.up_proj.copy_(up)
    ours.experts.down_proj.copy_(theirs.experts.down_proj)
    ours.router.weight.copy_(theirs.gate.weight)
    ours.router.bias_E.copy_(theirs.gate.e_score_correction_bias)
    copy_mlp(theirs.shared_experts, ours.shared)


@torch.no_grad()
def copy_model(theirs, ours) -> None:
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    ours.final_norm.weight.copy_(theirs.model.norm.weight)
    for source, target in zip(theirs.model.layers, ours.layers, strict=True):
        target.attention_norm.weight.copy_(source.input_layernorm.weight)
        target.ffn_norm.weight.copy_(source.post_attention_layernorm.weight)
        copy_attention(source.self_attn, target.attention)
        if hasattr(source.mlp, "experts"):
            copy_moe(source.mlp, target.ffn)
        else:
            copy_mlp(source.mlp, target.ffn)


@torch.no_grad()
def randomise(model) -> None:
    noise = torch.Generator().manual_seed(3)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        if "correction_bias" in name:
            # Group masking in the reference fills with 0, so parity needs a bias of at least 0.
            parameter.uniform_(0.0, 0.5, generator=noise)
        else:
            parameter.normal_(mean=float("norm" in name), std=0.2, generator=noise)


CASES = {
    "gqa+mlp is Llama": (llama, gqa_config(), MLPConfig(inner_dim=32)),
    "mlha+moe is DeepseekV3": (deepseek, mlha_config(latent_norm=True), moe_config()),
    "and so by the loop": (deepseek, mlha_config(latent_norm=True), moe_config(dispatch="loop")),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_reference(case):
    build, attention, ffn = CASES[case]
    theirs = build()
    randomise(theirs)
    model = model_config(tie_embeddings=False)
    ours = transformer(attention=attention, ffn=ffn, model=model)
    copy_model(theirs, ours)
    ids = tokens()
    their_logits, our_logits = theirs(input_ids=ids).logits, ours(ids)
    assert our_logits.abs().max() > 0.5
    torch.testing.assert_close(our_logits, their_logits, **CLOSE)
    targets = ids.roll(-1, 1).flatten()
    for logits in (their_logits, our_logits):
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
    # The gradients land in a second copy by the same route as the weights.
    expected = transformer(attention=attention, ffn=ffn, model=model)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
        if hasattr(theirs.model.layers[0].mlp, "gate"):
            for layer in theirs.model.layers:
                layer.mlp.gate.e_score_correction_bias.zero_()
    copy_model(theirs, expected)
    wanted = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
