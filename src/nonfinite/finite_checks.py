"""Which values of a tensor are finite; every check ignores tensors that cannot hold NaN."""

import cmath
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def can_be_nonfinite(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be NaN or infinite."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    # A sparse tensor's values are looked at when an operation reads them.
    return is_number and tensor.layout == torch.strided and not tensor.is_meta


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinities."""
    return all(_is_finite(t.detach()) for t in tensors if can_be_nonfinite(t))


def _is_finite(tensor: Tensor) -> bool:
    # Reading a single number takes less time than four operations on it.
    return cmath.isfinite(tensor.item()) if not tensor.dim() else bool(tensor.isfinite().all())


def any_nan(tensors: list[Tensor]) -> bool:
    """Whether a tensor holds a NaN."""
    return any(bool(t.detach().isnan().any()) for t in tensors if can_be_nonfinite(t))


def absmax(tensors: list[Tensor]) -> float:
    """The largest absolute value; 0 if there is none."""
    values = [t.detach().abs().max().item() for t in tensors if can_be_nonfinite(t) and t.numel()]
    return float(max(values, default=0.0))


def growth_factor(operands: list[Tensor], result: Tensor) -> float:
    """How much larger a result is than the smallest operand that is not 0; 0 if there is none."""
    sizes = [size for size in (absmax([operand]) for operand in operands) if size > 0]
    return absmax([result]) / min(sizes) if sizes else 0.0


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is an additive mask: each entry is 0 or -inf, and at least one is 0."""
    if not tensor.is_floating_point():
        return False
    zero, hidden = tensor == 0, tensor == -torch.inf
    return bool((zero | hidden).all()) and bool(zero.any())


def is_invalid(weight: Tensor) -> bool:
    """Whether a parameter or buffer holds NaN, or infinities if it is trained.

    Infinities in an untrained tensor may be a mask.
    """
    return not all_finite([weight]) if weight.requires_grad else any_nan([weight])
