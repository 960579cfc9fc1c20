"""Llama models: translates config.json and weight names to this project's and back."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor

from src.common.errors import InputError
from src.config.field_roles import switched_on
from src.model import ModelConfig
from src.model.architecture import ModelParts
from src.model.attention.gqa import GQAConfig
from src.model.ffn.mlp import MLPConfig

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings"),
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
LARGEST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**21}
"""Upper bounds, 2**31 for other fields; a larger value is a mistake that would fill the memory."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}
"""Fields of config.json for which this project's parts support only these values."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

DERIVED = "rotary_emb.inv_freq"
"""Ending of a name in older files for a buffer that follows from rope_theta."""

NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
"""Llama's module names in a layer by this project's."""


@dataclass(frozen=True, kw_only=True)
class LlamaFiles:
    """A Llama model as read from files."""

    place: str
    """The field that names the files, for errors."""
    config: Mapping[str, Any]
    """Content of config.json, or its equivalent."""
    tensors: Mapping[str, Tensor]
    """Weights by Llama's names."""
    tokenizer: tokenizers.Tokenizer


def llama_names(num_layers: int) -> dict[str, str]:
    """Llama's name of every weight by this project's name."""
    found = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    return weight_names(found, NAMES, num_layers, here="layers", there="model.layers")


def weight_names(
    single: Mapping[str, str],
    of_a_layer: Mapping[str, str],
    num_layers: int,
    *,
    here: str,
    there: str,
) -> dict[str, str]:
    """Every weight's name in a second layout by its name in a first one.

    Args:
        single: modules outside the layers: first to second name.
        of_a_layer: modules of a layer: first to second name.
        num_layers: number of layers.
        here: prefix of layers in the first layout.
        there: prefix of layers in the second layout.
    """
    found = dict(single)
    for layer in range(num_layers):
        for one, other in of_a_layer.items():
            found[f"{here}.{layer}.{one}"] = f"{there}.{layer}.{other}"
    return {f"{one}.weight": f"{other}.weight" for one, other in found.items()}


def parts_from_llama(files: LlamaFiles) -> ModelParts:
    """Configuration of the parts, from config.json.

    Raises:
        InputError: the model has another architecture, or config.json lacks a size.
    """
    config, place = files.config, files.place
    for field, allowed in ONLY.items():
        if config.get(field, allowed[0]) not in allowed:
            shown = "null" if allowed[0] is None else allowed[0]
            raise InputError(
                f"{place}: {field}={config[field]}: must be {shown}; only Llama models can be read"
                " (RMSNorm, rotary positions, SwiGLU, no biases, not quantised)"
            )
    if "model_type" not in config:
        raise InputError(f"{place}: has no model_type")
    sizes = {field: _size(config, field, place) for field in SIZES}
    sizes |= {
        field: _size(config, field, place)
        for field in OPTIONAL_SIZES
        if config.get(field) is not None
    }
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise InputError(f"{place}: tie_word_embeddings={tied}: must be true or false")
    heads, hidden_dim = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = sizes.get("head_dim", hidden_dim // heads)
    eps, rope_theta = _number(config, "rms_norm_eps", place), _rope_theta(config, place)
    named_std = config.get("initializer_range") is not None
    init_std = _number(config, "initializer_range", place) if named_std else 0.02
    try:
        model = ModelConfig(
            hidden_dim=hidden_dim,
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            head_dim=head_dim,
            inner_dim=sizes["intermediate_size"],
            vocab_size=sizes["vocab_size"],
            tie_embeddings=tied,
            norm_eps=eps,
            rope_theta=rope_theta,
            init_std=init_std,
            router_init_std=None,
            residual_init="plain",
            sizes={},
        )
        attention = GQAConfig(
            num_kv_heads=sizes.get("num_key_value_heads", heads), rope_dim=head_dim, qk_norm=False
        )
        attention.check(model.dims())
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    return ModelParts(
        model=model,
        attention=attention,
        ffn=MLPConfig(inner_dim=sizes["intermediate_size"]),
        seq_len=sizes["max_position_embeddings"],
    )


def _size(config: Mapping[str, Any], field: str, place: str) -> int:
    value, largest = config.get(field), LARGEST.get(field, 2**31)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(f"{place}: {field}={value}: must be an integer from 1 to {largest}")
    return value


def _number(values: Mapping[str, Any], field: str, place: str) -> float:
    value: Any = values.get(field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= sys.float_info.max:
        return float(value)
    raise InputError(f"{place}: {field}={value}: must be a number above 0")


def _rope_theta(config: Mapping[str, Any], place: str) -> float:
    """The rope base, from the places where older and newer files have it."""
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10_000.0)}
    for field in ("rope_scaling", "rope_parameters"):
        values = config.get(field) or {}
        if not isinstance(values, Mapping):
            raise InputError(f"{place}: {field}={values}: must be an object")
        rope |= values
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{place}: rope_type={kind}: must be default (no scaling of positions)")
    return _number(rope, "rope_theta", place)


def weights_from_llama(files: LlamaFiles, parts: ModelParts) -> dict[str, Tensor]:
    """Weights by this project's names, float32.

    Raises:
        InputError: a weight is missing, unknown, or not a floating-point tensor.
    """
    tensors, place = files.tensors, files.place
    known = llama_names(parts.model.num_layers)
    head = known["head.weight"]
    if parts.model.tie_embeddings:
        known["head.weight"] = known["embedding.weight"]
    missing = [theirs for theirs in known.values() if theirs not in tensors]
    if missing:
        raise InputError(f"{place}: has no {missing[0]} ({len(missing)} weights are missing)")
    more = set(tensors) - set(known.values()) - {head}
    more = {name for name in more if not name.endswith(DERIVED)}
    if more:
        raise InputError(
            f"{place}: {min(more)} is not a Llama weight ({len(more)} unknown weights)"
        )
    for name in known.values():
        if tensors[name].dtype not in FLOATS:
            raise InputError(
                f"{place}: {name} is {tensors[name].dtype}; must be a float with 16 to 64 bits"
            )
    return {ours: tensors[theirs].float() for ours, theirs in known.items()}


def llama_config(parts: ModelParts, *, end_ids: Collection[int]) -> dict[str, Any]:
    """Content of config.json for a model of this project.

    Args:
        parts: configuration of its parts, with the vocabulary size filled in.
        end_ids: ids of tokens that end a text.

    Raises:
        InputError: the model has parts that Llama lacks.
    """
    model, attention = parts.model, parts.attention
    head_dim = model.dims().head_dim
    reason = None
    if not isinstance(attention, GQAConfig) or not isinstance(parts.ffn, MLPConfig):
        reason = "attention=gqa and ffn=mlp"
    elif attention.qk_norm:
        reason = "attention.qk_norm=false"
    elif attention.rope_dim != head_dim:
        reason = f"attention.rope_dim={head_dim}, the whole head"
    added = switched_on({"model": model, "attention": attention, "ffn": parts.ffn})
    if reason is None and added is not None:
        reason = f"no {added}"
    if reason is not None:
        raise InputError(f"to=hf: can write only Llama models, which have {reason}")
    assert isinstance(attention, GQAConfig)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": parts.ffn.inner_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": parts.seq_len,
        "rms_norm_eps": model.norm_eps,
        # Older readers look for rope_theta at the top level, newer ones in rope_parameters.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        # null if there is none; without the key, readers would use Llama's own ids.
        "bos_token_id": None,
        "eos_token_id": sorted(end_ids) or None,
        "dtype": "float32",
    }


def end_ids(files: LlamaFiles, *, vocab_size: int) -> list[int]:
    """Ids of the tokens that end a text, from config.json.

    Raises:
        InputError: an id is not a token of the vocabulary.
    """
    named = files.config.get("eos_token_id")
    found = [] if named is None else named if isinstance(named, list) else [named]
    for entry in found:
        if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < vocab_size:
            raise InputError(
                f"{files.place}: eos_token_id={named}: must be a token below"
                f" vocab_size={vocab_size}, a list of them, or null"
            )
    return found


def weights_to_llama(weights: Mapping[str, Tensor], parts: ModelParts) -> dict[str, Tensor]:
    """Weights by Llama's names, in their dtype."""
    known = llama_names(parts.model.num_layers)
    if parts.model.tie_embeddings:
        del known["head.weight"]
    return {theirs: weights[ours].contiguous() for ours, theirs in known.items()}
