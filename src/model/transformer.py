"""A decoder-only transformer whose attention and feed-forward parts are interchangeable.

Axes: B batch, T time, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.model.attention import Attention, AttentionConfig
from src.model.bounds import SoftCap, check_bound
from src.model.cache import Cache, Rope, Span
from src.model.dims import MAX_LAYERS, MAX_VOCAB, Dims, check_sizes
from src.model.ffn import FeedForward, FeedForwardConfig
from src.model.ffn.router import Router
from src.model.norm import RMSNorm
from src.model.rope import RotaryTable

GeneratorFor = Callable[[str], torch.Generator]


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes and initialisation of a model."""

    hidden_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Query heads a layer."""
    head_dim: int | None
    """Dimensions of one head; null: hidden_dim / num_heads, which must then divide."""
    inner_dim: int
    """Inner width of a dense SwiGLU."""
    vocab_size: int | None
    """Rows of the embedding; null: the tokenizer's number of tokens."""
    tie_embeddings: bool
    """Use the embedding as the output projection too."""
    norm_eps: float
    """Epsilon of every RMSNorm; above 0."""
    rope_theta: float
    """Base of the rotary frequencies; above 0."""
    init_std: float
    """Standard deviation of the normal initialisation; above 0."""
    router_init_std: float | None
    """Standard deviation for router weights; null: init_std."""
    residual_init: str
    """plain: init_std everywhere; depth_scaled: init_std / sqrt(2 L) for residual projections."""
    sizes: dict[str, Any]
    """Sizes at this scale for the attention and ffn options, whose YAML files interpolate them."""
    head_softcap: float | None = None
    """Bound of a soft-cap on the output logits (arXiv 2408.00118); above 0; null: none."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "num_layers", "num_heads", "inner_dim", "head_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1")
        check_sizes(self, ("hidden_dim", "num_heads", "inner_dim", "head_dim"))
        check_sizes(self, ("num_layers",), most=MAX_LAYERS)
        check_sizes(self, ("vocab_size",), most=MAX_VOCAB)
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 2")
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim={self.hidden_dim}: must be divisible by num_heads={self.num_heads},"
                " or set model.head_dim"
            )
        for field in ("norm_eps", "rope_theta", "init_std", "router_init_std"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field}={value}: must be above 0 and finite")
        check_bound("head_softcap", self.head_softcap)
        if self.residual_init not in ("plain", "depth_scaled"):
            raise ValueError(
                f"residual_init={self.residual_init}: must be one of plain, depth_scaled"
            )

    def dims(self) -> Dims:
        """The sizes that the parts of the model share."""
        head_dim = self.head_dim or self.hidden_dim // self.num_heads
        return Dims(
            hidden_dim=self.hidden_dim,
            num_heads=self.num_heads,
            head_dim=head_dim,
            norm_eps=self.norm_eps,
        )


class Block(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward part."""

    attention: Attention
    ffn: FeedForward

    def __init__(self, attention: AttentionConfig, ffn: FeedForwardConfig, dims: Dims) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dims.hidden_dim, eps=dims.norm_eps)
        self.attention = attention.build(dims)
        self.ffn_norm = RMSNorm(dims.hidden_dim, eps=dims.norm_eps)
        self.ffn = ffn.build(dims)

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """Maps (B, T, D) to (B, T, D), over whole sequences."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))

    def extend(self, x_BTD: Tensor, kept: dict[str, Tensor], span: Span) -> Tensor:
        """As `forward`, for tokens that follow cached ones; see Attention.extend."""
        x_BTD = x_BTD + self.attention.extend(self.attention_norm(x_BTD), kept, span)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


RunBlock = Callable[[Block, Tensor, Rope], Tensor]


def run_block(block: Block, x_BTD: Tensor, rope: Rope) -> Tensor:
    """Calls a block."""
    y_BTD: Tensor = block(x_BTD, rope)
    return y_BTD


class Transformer(nn.Module):
    """Token ids in, logits out.

    So that routers can balance their load, a trainer must call `finish_batch` after each batch and
    `finish_step` after each optimizer step.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        attention: AttentionConfig,
        ffn: FeedForwardConfig,
        vocab_size: int,
        max_seq_len: int,
    ) -> None:
        super().__init__()
        dims = model.dims()
        attention.check(dims)
        self.embedding = nn.Embedding(vocab_size, dims.hidden_dim)
        self.layers = nn.ModuleList(Block(attention, ffn, dims) for _ in range(model.num_layers))
        self.final_norm = RMSNorm(dims.hidden_dim, eps=dims.norm_eps)
        self.head = nn.Linear(dims.hidden_dim, vocab_size, bias=False)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.softcap = None if model.head_softcap is None else SoftCap(model.head_softcap)
        self.rope = RotaryTable(
            rope_dim=attention.rope_dim, max_seq_len=max_seq_len, theta=model.rope_theta
        )
        self.checkpoint_blocks = False
        """Whether a training step keeps only the inputs of blocks; a trainer sets it."""
        self._cache_shapes = attention.cache_shapes(dims)
        # Collected once: walking over all modules takes 1 % of the time of a small step.
        self._routers = tuple(m for m in self.modules() if isinstance(m, Router))

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that the model accepts, in tokens."""
        return self.rope.cos_TR.shape[0]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token; position t depends on tokens 0 .. t alone.

        Raises:
            ValueError: the sequence is longer than max_seq_len.
        """
        return self.logits(self.states(tokens_BT))

    def states(self, tokens_BT: Tensor, call_block: RunBlock = run_block) -> Tensor:
        """The final hidden states, (B, T, D), from which the head computes logits.

        If `softcap` is not None, the head's product is not the logits yet.

        Args:
            tokens_BT: token ids.
            call_block: calls a block; a trainer may pass a compiled function.
        """
        rope = self.rope(tokens_BT.shape[1])
        x_BTD = self.embedding(tokens_BT)
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in self.blocks():
            x_BTD = (
                checkpointed(block, x_BTD, rope) if recompute else call_block(block, x_BTD, rope)
            )
        return self.final_norm(x_BTD)

    def new_cache(self, *, num_padding: Sequence[int], num_slots: int) -> Cache:
        """An empty cache for `extend`.

        Args:
            num_padding: padding tokens at the beginning of each row.
            num_slots: capacity of a row in tokens, including padding.

        Raises:
            ValueError: a row could become longer than max_seq_len.
        """
        longest = num_slots - min(num_padding)
        if longest > self.max_seq_len:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds the context of {self.max_seq_len}"
            )
        weight = self.embedding.weight
        return Cache(
            self._cache_shapes,
            num_layers=len(self.layers),
            num_slots=num_slots,
            num_padding_B=torch.tensor(num_padding, device=weight.device),
            rotary=self.rope.at,
            dtype=weight.dtype,
        )

    def extend(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Logits (B, T, V) of tokens that follow the cached ones; equal to those of `forward`.

        Raises:
            ValueError: the cache has too few free slots.
        """
        span = cache.span(tokens_BT.shape[1])
        x_BTD = self.embedding(tokens_BT)
        for block, kept in zip(self.blocks(), cache.layers, strict=True):
            x_BTD = block.extend(x_BTD, kept, span)
        cache.length = span.end
        return self.logits(self.final_norm(x_BTD))

    def logits(self, states_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) from the final hidden states (B, T, D)."""
        logits_BTV: Tensor = self.head(states_BTD)
        return logits_BTV if self.softcap is None else self.softcap(logits_BTV)

    def blocks(self) -> list[Block]:
        """The blocks, from first to last."""
        return cast(list[Block], list(self.layers))

    def routers(self) -> tuple[Router, ...]:
        """The routers, from the first layer to the last."""
        return self._routers

    def extra_losses(self) -> dict[str, Tensor]:
        """Weighted loss terms of the last forward pass, summed over layers, by metric name."""
        totals: dict[str, Tensor] = {}
        for block in self.blocks():
            for name, loss in block.ffn.extra_losses().items():
                totals[name] = totals[name] + loss if name in totals else loss
        return totals

    def finish_batch(self) -> None:
        """Must be called after each (micro-)batch in training."""
        for router in self.routers():
            router.finish_batch()

    def finish_step(self, *, applied: bool) -> None:
        """Must be called after each optimizer step; `applied` is False if the step was skipped."""
        for router in self.routers():
            router.finish_step(applied=applied)

    def num_params(self) -> int:
        """Parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_params(self) -> int:
        """Parameters that a single token uses; tied ones count once."""
        return self.num_params() - sum(block.ffn.num_inactive_params() for block in self.blocks())

    @torch.no_grad()
    def initialise(self, model: ModelConfig, generator_for: GeneratorFor) -> None:
        """Draws each weight from the random stream of its own name.

        Weights of one name and shape are therefore equal in all models of one seed, so that the
        arms of an ablation start from the same weights wherever they can.
        """
        router_std = model.router_init_std or model.init_std
        stds = {id(router.weight): router_std for router in self.routers()}
        if model.residual_init == "depth_scaled":
            scaled = model.init_std / math.sqrt(2 * model.num_layers)
            for block in self.blocks():
                for part in (block.attention, block.ffn):
                    for name, weight in part.named_parameters():
                        if name.removesuffix(".weight") in part.residual_projections:
                            stds[id(weight)] = scaled
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = stds.get(id(parameter), model.init_std)
                parameter.normal_(mean=0.0, std=std, generator=generator_for(name))


def checkpointed(block: nn.Module, x_BTD: Tensor, *others: Any) -> Tensor:
    """The block's output, keeping only its inputs for the backward pass (arXiv 1604.06174).

    The backward pass repeats the same operations on the same numbers, so gradients are the same,
    bitwise on deterministic kernels. The built-in blocks draw no random numbers, so no random state
    is saved; their routers count a batch only once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_counting(block)

    return checkpoint(
        block, x_BTD, *others, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


@contextmanager
def _without_counting(block: nn.Module) -> Iterator[None]:
    """Inside, routers keep the counts, losses and statistics of the first forward pass."""
    routers = [module for module in block.modules() if isinstance(module, Router)]
    for router in routers:
        router.is_recomputing = True
    try:
        yield
    finally:
        for router in routers:
            router.is_recomputing = False


def build_model(
    *,
    model: ModelConfig,
    attention: AttentionConfig,
    ffn: FeedForwardConfig,
    vocab_size: int,
    max_seq_len: int,
    generator_for: GeneratorFor,
) -> Transformer:
    """A freshly initialised model on the CPU.

    Args:
        model, attention, ffn: configurations of the model and its parts.
        vocab_size: rows of the embedding.
        max_seq_len: the longest sequence, in tokens.
        generator_for: returns the random stream for a parameter's name.

    Raises:
        ValueError: the sizes do not fit together; names field and value.
    """
    transformer = Transformer(
        model=model, attention=attention, ffn=ffn, vocab_size=vocab_size, max_seq_len=max_seq_len
    )
    transformer.initialise(model, generator_for)
    return transformer
