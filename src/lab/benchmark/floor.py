"""A lower bound on the time of a step: only its matrix products, attention and AdamW.

Axes: S tokens of a batch, I inputs and O outputs of a product.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.architecture import ModelParts
from src.model.attention.mlha import MLHAConfig
from src.model.ffn.moe import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product of the forward pass; products with the same input are joined."""

    rows: int
    inputs: int
    outputs: int
    count: int


def products(parts: ModelParts, *, tokens: int, vocab_size: int) -> Iterator[Product]:
    """All matrix products of a forward pass; routed experts are assumed to have equal loads."""
    dims, layers = parts.model.dims(), parts.model.num_layers
    hidden, heads, head = dims.hidden_dim, dims.num_heads, dims.head_dim

    def product(inputs: int, outputs: int, *, rows: int = tokens, count: int = 1) -> Product:
        return Product(rows=rows, inputs=inputs, outputs=outputs, count=layers * count)

    attention, ffn = parts.attention, parts.ffn
    if isinstance(attention, MLHAConfig):
        rope_keys = attention.num_rope_keys * attention.rope_dim
        yield product(hidden, attention.q_latent_dim + attention.kv_latent_dim + rope_keys)
        yield product(attention.q_latent_dim, heads * head)
        yield product(attention.kv_latent_dim, heads * (2 * head - attention.rope_dim))
    else:
        kv_heads = sum(count for count, _ in attention.cache_shapes(dims).values())
        yield product(hidden, (heads + kv_heads) * head)
    yield product(heads * head, hidden)
    if isinstance(ffn, MoEConfig):
        yield product(hidden, ffn.num_routed)
        rows = tokens * ffn.top_k // ffn.num_routed
        yield product(hidden, 2 * ffn.inner_dim, rows=rows, count=ffn.num_routed)
        yield product(ffn.inner_dim, hidden, rows=rows, count=ffn.num_routed)
    dense = ffn.inner_dim * (ffn.num_shared if isinstance(ffn, MoEConfig) else 1)
    if dense:
        yield product(hidden, 2 * dense)
        yield product(dense, hidden)
    yield Product(rows=tokens, inputs=hidden, outputs=vocab_size, count=1)


class Floor:
    """The lower bound's step. It allocates all tensors in advance.

    Args:
        parts: configuration of the model's parts.
        batch_size: rows of the batch.
        vocab_size: vocabulary size.
        num_params: parameters that AdamW updates.
        dtype: dtype of products and attention.
        device: device of all tensors.
    """

    def __init__(
        self,
        parts: ModelParts,
        *,
        batch_size: int,
        vocab_size: int,
        num_params: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        tokens = batch_size * parts.seq_len
        self._products: list[tuple[int, list[Tensor]]] = []
        for p in products(parts, tokens=tokens, vocab_size=vocab_size):
            shapes = (p.rows, p.inputs), (p.inputs, p.outputs), (p.rows, p.outputs)
            # Input, weight and result, and a gradient for each of them.
            self._products.append((p.count, [random(*shape) for shape in 2 * shapes]))
        dims = parts.model.dims()
        shape = batch_size, dims.num_heads, parts.seq_len, dims.head_dim
        self._query, self._key, self._value = (random(*shape).requires_grad_() for _ in range(3))
        self._grad = random(*shape)
        self._num_layers = parts.model.num_layers
        weight = nn.Parameter(torch.zeros(num_params, device=device))
        weight.grad = torch.zeros_like(weight)
        self._optimizer = torch.optim.AdamW([weight], fused=True)

    def step(self) -> None:
        """All products with both gradients, attention forward and backward, and AdamW."""
        with torch.no_grad():
            for count, (x_SI, w_IO, y_SO, dx_SI, dw_IO, dy_SO) in self._products:
                for _ in range(count):
                    torch.mm(x_SI, w_IO, out=y_SO)
                    torch.mm(dy_SO, w_IO.t(), out=dx_SI)
                    torch.mm(x_SI.t(), dy_SO, out=dw_IO)
        for _ in range(self._num_layers):
            inputs = self._query, self._key, self._value
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out, inputs, self._grad)
        self._optimizer.step()
