"""Sizes and costs of a model, counted on shapes alone."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.model.transformer import ModelConfig, Transformer

BYTES_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a composition weighs."""

    params_total: int
    """Parameters, tied ones once."""
    params_active: int
    """Parameters that one token passes through."""
    params_by_part: dict[str, int]
    """The total by part of the model."""
    vocab_size: int
    cache_bytes_per_token: int | None
    """Keys and values that decoding keeps for a token, all layers, in float32; None
    where it is not known."""
    decoding: str
    """How decoding attends to the cache."""
    flops_per_token: int
    """Training, forward and backward: three times the forward pass."""
    forward_flops_per_token: int
    """Two for each active weight in a product, and attention at half the context on average."""
    checkpoint_bytes: int
    """Weights and AdamW's two moments, and averaged weights where there are any, in float32."""

    def plain(self) -> dict[str, Any]:
        """The figures by name."""
        return dataclasses.asdict(self)


def measure(
    *,
    model: ModelConfig,
    attention: AttentionConfig,
    ffn: FeedForwardConfig,
    vocab_size: int,
    seq_len: int,
    averaged_weights: bool = False,
) -> Size:
    """Builds the model on the meta device, where tensors have shapes and no memory.

    Raises:
        ValueError: sizes that do not go together.
    """
    with torch.device("meta"):
        built = Transformer(
            model=model, attention=attention, ffn=ffn, vocab_size=vocab_size, max_seq_len=seq_len
        )
    dims = model.dims()
    total, active = built.num_params(), built.num_active_params()
    # The embedding is a lookup; tied, its weights are used once more as the head's product.
    embedding = built.embedding.weight.numel()
    product_weights = active if model.tie_embeddings else active - embedding
    # A causal query sees (T + 1) / 2 keys on average, in scores and in the weighted sum.
    attention_flops = 2 * model.num_layers * dims.num_heads * dims.head_dim * (seq_len + 1)
    forward = 2 * product_weights + attention_flops
    kept = sum(heads * dim for heads, dim in attention.cache_shapes(dims).values())
    cache = kept * model.num_layers * BYTES_FLOAT32
    copies = 3 + averaged_weights
    return Size(
        params_total=total,
        params_active=active,
        params_by_part=_by_part(built),
        vocab_size=vocab_size,
        cache_bytes_per_token=cache,
        decoding=attention.decoding,
        flops_per_token=3 * forward,
        forward_flops_per_token=forward,
        checkpoint_bytes=total * BYTES_FLOAT32 * copies,
    )


def _by_part(built: Transformer) -> dict[str, int]:
    """embedding, attention, router, routed experts, shared experts or dense ffn, norms."""
    parts: dict[str, int] = {}
    for name, parameter in built.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".attention." in name:
            part = "attention"
        elif ".router." in name:
            part = "routers"
        elif ".experts." in name:
            part = "routed experts"
        elif ".shared." in name:
            part = "shared experts"
        elif ".ffn." in name:
            part = "dense ffn"
        else:
            part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
