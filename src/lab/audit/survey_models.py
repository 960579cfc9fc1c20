"""The causal language models of the installed transformers, small, with random weights."""

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("decoder_ffn_dim", "q_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "time_step_rank", "conv_kernel"), 4),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "expand"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_num_shared_experts", "n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 0),
}
"""Values of configuration fields; a field that a family does not have is left out."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dots1": {"norm_topk_prob": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "cohere2_moe": {"expert_selection_fn": "sigmoid"},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "flint": {"mlp_only_layers": []},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "kolibri1": {"norm_topk_prob": True},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "step3p7_text": {
        "layer_types": ["full_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
        "sliding_window": 4,
        "share_expert_dim": 16,
    },
}
"""Settings without which a router divides by nothing, or a family cannot be built so small."""

ROWS, TIME = 2, 8
"""Shape of the random token ids."""

MAX_PARAMETERS = 2_000_000
"""A family that cannot be built smaller than this is left out."""


class UndersizedError(ValueError):
    """A family cannot be built small, or not run on token ids."""


class HiddenStates(nn.Module):
    """A model without a head: it returns its last hidden states.

    Args:
        model: a model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The hidden states, of shape (rows, time, dim)."""
        hidden: torch.Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden


def families() -> list[str]:
    """All families with a causal language model, and those whose text model alone is small."""
    from transformers.models.auto import modeling_auto

    return sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TEXT_MODELS})


TEXT_MODELS = {"step3p7_text": ("Step3p7TextConfig", "Step3p7TextModel")}
"""Families whose text model has a configuration of its own and no head: their two classes."""


def small_model(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model of a family with random weights, in training mode, and its inputs.

    Raises:
        UndersizedError: the family cannot be built small.
    """
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    tokens = torch.randint(3, 60, (ROWS, TIME), generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            torch.manual_seed(0)
            if family in TEXT_MODELS:
                module = modules_of(family)
                config_name, model_name = TEXT_MODELS[family]
                config = _config(getattr(module[0], config_name), family)
                return HiddenStates(getattr(module[1], model_name)(config)).train(), {
                    "input_ids": tokens
                }
            config = _config(configuration_auto.CONFIG_MAPPING[family], family)
            names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
            kind = getattr(transformers, names if isinstance(names, str) else names[0])
            _check_size(kind, config)
            model = kind(config).train()
            inputs = {"input_ids": tokens, "labels": tokens.clone()}
            model(**inputs)
    # A family may fail in any way with a configuration that it was not made for.
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UndersizedError(f"{type(error).__name__}: {first[:100]}") from error
    return model, inputs


def modules_of(family: str) -> Sequence[Any]:
    """The two modules of a text model: that of its configuration, and its own."""
    name = family.removesuffix("_text")
    root = f"transformers.models.{name}"
    kinds = ("configuration", "modeling")
    return [importlib.import_module(f"{root}.{kind}_{name}") for kind in kinds]


def _config(kind: Any, family: str) -> Any:
    try:
        known = {field.name for field in dataclasses.fields(kind)}
    except TypeError:
        known = set(inspect.signature(kind.__init__).parameters)
    fields = {name: value for name, value in SIZES.items() if name in known}
    return kind(**{**fields, **SETTINGS.get(family, {})})


def _check_size(kind: Any, config: Any) -> None:
    """Raises UndersizedError for a model with too many parameters; allocates none of them."""
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in kind(config).parameters())
    if number > MAX_PARAMETERS:
        raise UndersizedError(f"has {number:,} parameters")
