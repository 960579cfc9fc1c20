"""Parameter counts, memory and FLOPs of a model, computed from shapes alone."""

from dataclasses import dataclass

import torch

from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.model.transformer import ModelConfig, Transformer

BYTES_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameter counts, memory and FLOPs of a model."""

    params_total: int
    """Parameters; tied ones count once."""
    params_active: int
    """Parameters that one token uses."""
    params_by_part: dict[str, int]
    """params_total, by part of the model."""
    vocab_size: int
    cache_bytes_per_token: int | None
    """Bytes that decoding caches for a token in all layers, in float32; None if unknown."""
    decoding: str
    """How decoding attends to the cache, in a few words."""
    flops_per_token: int
    """FLOPs of a training step for a token: three times the forward pass."""
    forward_flops_per_token: int
    """Two for each active weight of a matrix product, plus attention over half the context."""
    checkpoint_bytes: int
    """Weights, AdamW's two moments, and averaged weights if any, in float32."""


def measure(
    *,
    model: ModelConfig,
    attention: AttentionConfig,
    ffn: FeedForwardConfig,
    vocab_size: int,
    seq_len: int,
    averaged_weights: bool = False,
) -> Size:
    """Counts a model built on the meta device, where tensors have shapes but no memory.

    Raises:
        ValueError: the sizes do not fit together.
    """
    with torch.device("meta"):
        built = Transformer(
            model=model, attention=attention, ffn=ffn, vocab_size=vocab_size, max_seq_len=seq_len
        )
    dims = model.dims()
    total, active = built.num_params(), built.num_active_params()
    # The embedding is a lookup without FLOPs, unless its weights are also the head's.
    embedding = built.embedding.weight.numel()
    product_weights = active if model.tie_embeddings else active - embedding
    # A causal query attends to (T + 1) / 2 keys on average, in the scores and the weighted sum.
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
    """Number of parameters of each part; a parameter's part follows from its name."""
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
