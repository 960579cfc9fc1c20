"""How far an audit lets weights and inputs go: the range of its proofs and of its search."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from nonfinite.auditing.value_ranges import TRUTH, Known
from nonfinite.origins import memory_of

IGNORED = -100
"""The label that torch's losses ignore."""

FEW = 8
"""Columns up to this number are tried one by one."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The range of weights and inputs."""

    weights: float = 8.0
    """Absolute value that an entry of a weight or saved buffer may take, if it has none above."""
    inputs: float = 8.0
    """Factor by which floating-point inputs may exceed their largest absolute value, or 1 if that
    is larger."""
    overflow_doublings: float = 3.0
    """Doublings that the largest entry of a weight may grow for an overflow of a sum or product: in
    float16, any of these overflows with weights large enough."""

    def of_weight(self, tensor: Tensor) -> float:
        """The largest absolute value that entries of a weight may take."""
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        return max(self.weights, largest)

    def __str__(self) -> str:
        return (
            f"weights up to {self.weights:g} (for overflows {2**self.overflow_doublings:g} times as"
            f" large as now), inputs up to {self.inputs:g} times as large"
        )

    def of_input(self, tensor: Tensor) -> Known:
        """Bounds of an input: inputs without a negative value keep their sign."""
        if tensor.dtype == torch.bool or not tensor.numel():
            return TRUTH
        least, most = float(tensor.min()), float(tensor.max())
        if not tensor.is_floating_point():
            return Known(low=min(least, float(IGNORED)), high=most)
        if is_binary_mask(tensor):
            return TRUTH
        bound = self.inputs * max(abs(least), abs(most), 1.0)
        return Known(low=0.0 if least >= 0 else -bound, high=bound)


def is_binary_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros and ones alone, such as a mask."""
    return bool(((tensor == 0) | (tensor == 1)).all())


def weight_ranges(model: nn.Module, reach: Reach) -> dict[int, Known]:
    """Bounds of all weights and buffers, by the memory that holds them.

    Buffers that are saved with the weights may change in training, others are tables. A variance
    does not become negative.
    """
    ranges = {}
    for _, parameter in model.named_parameters():
        bound = reach.of_weight(parameter)
        ranges[memory_of(parameter)] = Known(low=-bound, high=bound)
    for name, buffer in movable_buffers(model):
        bound = reach.of_weight(buffer)
        low = 0.0 if name.endswith("var") else -bound
        ranges[memory_of(buffer)] = Known(low=low, high=bound)
    return ranges


def movable_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point buffers that are saved with the weights."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            is_saved = name not in module._non_persistent_buffers_set
            if is_saved and buffer.is_floating_point():
                yield f"{path}.{name}" if path else name, buffer


def leaves_of(inputs: Any) -> list[tuple[str, Any]]:
    """The leaves of the inputs with the expressions that reach them, such as `['x'][0]`."""
    flat, _ = tree_flatten_with_path(inputs)
    return [(f"inputs{keystr(path)}", leaf) for path, leaf in flat]


def with_leaf(inputs: Any, place: int, value: Tensor) -> Any:
    """The inputs with one leaf replaced."""
    flat, spec = tree_flatten_with_path(inputs)
    values = [leaf for _, leaf in flat]
    values[place] = value
    return tree_unflatten(values, spec)


def changed_inputs(inputs: Any, reach: Reach) -> Iterator[tuple[str, Any]]:
    """Inputs within reach at which operations often fail, each with a sentence that says what."""
    leaves = leaves_of(inputs)
    tensors = [(i, name, leaf) for i, (name, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
    for place, name, leaf in tensors:
        for what, value in _changed(leaf, reach):
            yield f"{name} {what}", with_leaf(inputs, place, value)
        for _, other_name, other in tensors:
            is_alike = other.shape == leaf.shape and other.dtype == leaf.dtype
            if other is not leaf and is_alike and leaf.is_floating_point():
                yield f"{name} equal to {other_name}", with_leaf(inputs, place, other.clone())
    # The last batch of an epoch may have one row.
    alone = first_rows(inputs)
    if alone is not None:
        yield "the first row of the inputs alone", alone


def enlarged(inputs: Any, reach: Reach) -> tuple[Any, float] | None:
    """The inputs with every floating-point number at its largest; None if no input has any.

    Masks of zeros and ones stay.

    Returns:
        The inputs, and the factors of two by which the largest has grown.
    """
    flat, spec = tree_flatten_with_path(inputs)
    values: list[Any] = []
    grown: list[float] = []
    for _, leaf in flat:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
        if is_number and not is_binary_mask(leaf):
            factor = reach.of_input(leaf).high / float(leaf.abs().max().clamp_min(1e-12))
            leaf = leaf * factor
            grown.append(math.log2(factor))
        values.append(leaf)
    return (tree_unflatten(values, spec), max(grown)) if grown else None


def hidden_inputs(inputs: Any) -> Iterator[tuple[str, Any]]:
    """Inputs with a mask that hides everything: all of its entries are alike."""
    for place, (name, leaf) in enumerate(leaves_of(inputs)):
        if isinstance(leaf, Tensor) and leaf.numel() and is_binary_mask(leaf):
            yield f"{name} of ones", with_leaf(inputs, place, torch.ones_like(leaf))
            yield f"{name} of zeros", with_leaf(inputs, place, torch.zeros_like(leaf))


def num_rows(inputs: Any) -> int:
    """The size of the first axis of the first tensor that has axes: that of the batch."""
    sized = [leaf for _, leaf in leaves_of(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    return max(len(sized[0]), 1) if sized else 1


def first_rows(inputs: Any) -> Any | None:
    """The first row of all tensors that have the batch's rows; None if there is one alone."""
    rows = num_rows(inputs)
    if rows < 2:
        return None
    flat, spec = tree_flatten_with_path(inputs)
    values = [leaf for _, leaf in flat]
    cut = [v[:1] if isinstance(v, Tensor) and v.shape[:1] == (rows,) else v for v in values]
    return tree_unflatten(cut, spec)


def _changed(leaf: Tensor, reach: Reach) -> Sequence[tuple[str, Tensor]]:
    if not leaf.numel():
        return []
    zero = ("of zeros", torch.zeros_like(leaf))
    if not leaf.dim():
        known = reach.of_input(leaf)
        return [zero, ("at the largest value in range", torch.full_like(leaf, int(known.high)))]
    row = leaf.clone()
    row[0] = 0
    first = ("whose first row is 0", row)
    if leaf.dtype == torch.bool or is_binary_mask(leaf):
        found = [first, zero, ("of ones", torch.ones_like(leaf))]
        for number in (0, 1):
            marked = leaf.clone()
            marked[..., :1] = number
            found += [(f"whose first column is {number}", marked)]
        return found
    same = ("all of whose entries are the same", torch.full_like(leaf, leaf.flatten()[0].item()))
    if not leaf.is_floating_point():
        ignored = torch.full_like(leaf, IGNORED)
        part = leaf.clone()
        part[:1] = IGNORED
        return [
            ("with the ignored label alone", ignored),
            ("whose first row has the ignored label", part),
            zero,
            first,
            same,
        ]
    known = reach.of_input(leaf)
    largest = leaf.abs().max().clamp_min(1e-12)
    found = [zero, first, ("whose rows are equal", leaf[:1].expand_as(leaf).clone()), same]
    found += [(f"times {known.high / largest:.3g}", leaf * (known.high / largest))]
    found += [("as small as 1e-4 of itself", leaf * 1e-4)]
    found += [("of ones with its signs", leaf.sign())]
    if known.low < 0:
        found += [("all at the least value in range", torch.full_like(leaf, known.low))]
    found += [("all at the largest value in range", torch.full_like(leaf, known.high))]
    if leaf.dim() > 1 and leaf.shape[-1] <= FEW:
        for column in range(leaf.shape[-1]):
            value = leaf.clone()
            value[..., column] = 0
            found += [(f"whose column {column} is 0", value)]
    return found
