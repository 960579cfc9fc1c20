"""A matrix product for each group of rows, in one operation.

Axes: N rows, sorted by group, I inputs, O outputs, E groups.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8
"""Entries of bfloat16, the narrowest dtype, in the 16 bytes to which the kernel aligns."""


def grouped_product(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`rows @ weight[e].T` for the rows of each group e; (N, O).

    Args:
        rows_NI: the rows of all groups, sorted by group.
        weight_EOI: one weight matrix for each group, in the dtype of the rows.
        ends_E: int32, the exclusive end of each group's rows; the last entry is N.
    """
    is_compilable = rows_NI.dtype == torch.bfloat16 and rows_NI.device.type != "cpu"
    if torch.compiler.is_compiling() and not is_compilable:
        product: Tensor = _compilable(rows_NI, weight_EOI, ends_E)
        return product
    return _grouped_mm(rows_NI, weight_EOI, ends_E)


def _grouped_mm(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """PyTorch's kernel, without a host sync."""
    outputs, inputs = weight_EOI.shape[1:]
    # The kernel's strides must be multiples of 16 bytes, so the sizes are padded with zeros.
    more_inputs, more_outputs = -inputs % ALIGNMENT, -outputs % ALIGNMENT
    if more_inputs or more_outputs:
        rows_NI = F.pad(rows_NI, (0, more_inputs))
        weight_EOI = F.pad(weight_EOI, (0, more_inputs, 0, more_outputs))
    return F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=ends_E)[:, :outputs]


# On a CPU, and in float32 on a GPU, PyTorch's kernel also computes one product for each group, but
# torch.compile cannot handle it.
@torch.library.custom_op("src::grouped_product", mutates_args=())
def _compilable(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    product_NO = rows_NI.new_empty(len(rows_NI), weight_EOI.shape[1])
    for group, start, end in _groups(ends_E):
        torch.mm(rows_NI[start:end], weight_EOI[group].t(), out=product_NO[start:end])
    return product_NO


@torch.library.custom_op("src::grouped_product_backward", mutates_args=())
def _compilable_backward(
    grad_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_rows_NI = torch.empty_like(rows_NI)
    grad_weight_EOI = torch.zeros_like(weight_EOI)
    for group, start, end in _groups(ends_E):
        grad = grad_NO[start:end]
        torch.mm(grad, weight_EOI[group], out=grad_rows_NI[start:end])
        torch.mm(grad.t(), rows_NI[start:end], out=grad_weight_EOI[group])
    return grad_rows_NI, grad_weight_EOI


def _groups(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Number, first row and exclusive end of each group that has rows."""
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > start:
            yield group, start, end
        start = end


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_compilable_backward(grad_NO, *ctx.saved_tensors), None


# torch.compile needs the shapes of the results and the backward pass.
_compilable.register_fake(lambda rows, weight, ends: rows.new_empty(len(rows), weight.shape[1]))
_compilable_backward.register_fake(
    lambda grad, rows, weight, ends: (torch.empty_like(rows), torch.empty_like(weight))
)
_compilable.register_autograd(_backward, setup_context=_setup_context)
