"""Bounds of operations that copy, choose, join and write elements."""

from dataclasses import replace

import torch
from torch import Tensor

from nonfinite.auditing.value_ranges import (
    ANY,
    SLACK,
    TRUTH,
    Known,
    Rule,
    Step,
    exactly,
    hull,
    named,
    plus,
    product,
    times,
)


def _same(step: Step) -> Known:
    """Copies, conversions, and views that keep each element where it is."""
    known, source = step.of(0), step.args[0]
    if source.is_floating_point() and not step.result.is_floating_point():
        # Rounded towards 0; or bits that are read as other numbers, of which nothing is known.
        low, high = min(known.low, 0.0), max(known.high, 0.0)
        return Known(low=low, high=high) if step.name == "_to_copy" else ANY
    if source.dtype != step.result.dtype and step.name != "_to_copy":
        return ANY
    if source.shape == step.result.shape:
        return known
    if step.name == "expand":
        keeps_last = step.args[0].dim() and step.args[0].shape[-1] == step.result.shape[-1]
        return known if keeps_last else replace(known, peak=None)
    keeps_last = step.args[0].dim() and step.args[0].shape[-1] == step.result.shape[-1]
    return replace(known.plain(), peak=known.peak if keeps_last else None)


def _moved(step: Step) -> Known:
    """Views and copies that move elements, or leave some of them out."""
    return step.of(0).plain()


def _padded(step: Step) -> Known:
    value = step.get(2, "value", 0.0) if step.name == "constant_pad_nd" else 0.0
    return hull(step.of(0).plain(), step.known(value or 0.0))


def _picked(step: Step) -> Known:
    """Elements of the operand: topk, sort, gather, select and the like."""
    known = step.of(0).plain()
    if step.name != "topk" or not step.get(3, "largest", True):
        return known
    is_last = step.get(2, "dim", -1) in (-1, step.args[0].dim() - 1)
    return replace(known, peak=step.of(0).peak) if is_last else known


def _added_at(step: Step) -> Known:
    """index_add and scatter_add: each element gets from none to all of the added values."""
    a, source = step.of(0), step.of(3)
    number = max(step.args[2].numel(), 1)
    least = min(product(source.low, number), 0.0) * SLACK
    most = max(product(source.high, number), 0.0) * SLACK
    alpha = float(step.kwargs.get("alpha", 1))
    return plus(a, times(Known(low=least, high=most), exactly(alpha)))


def _joined(*places: int) -> Rule:
    """The result holds elements of these arguments."""

    def rule(step: Step) -> Known:
        parts: list[Known] = []
        for place in places:
            value = step.get(place)
            entries = value if isinstance(value, list | tuple) else [value]
            parts += [step.known(entry) for entry in entries if entry is not None]
        return hull(*parts) if parts else ANY

    return rule


def _index_put(step: Step) -> Known | None:
    if step.get(3, "accumulate", False):
        return None
    return hull(step.of(0).plain(), step.of(2).plain())


def _where(step: Step) -> Known | None:
    if len(step.args) < 3:
        return None
    condition, a, b = step.of(0), step.of(1), step.of(2)
    return _chosen(condition, a, b, step)


def _masked_fill(step: Step) -> Known:
    condition, value = step.of(1), step.of(2)
    return _chosen(condition, value, step.of(0), step)


def _chosen(condition: Known, a: Known, b: Known, step: Step) -> Known:
    """Elements of a where the condition holds, else of b."""
    if condition.condition is not None:
        token, relation, limit = condition.condition
        if token == a.token:
            a = _restricted(a, relation, limit, step)
        if token == b.token:
            b = _restricted(b, OPPOSITE[relation], limit, step)
    return hull(a, b)


OPPOSITE = {"eq": "ne", "ne": "eq", "gt": "le", "ge": "lt", "lt": "ge", "le": "gt"}


def _restricted(known: Known, relation: str, limit: float, step: Step) -> Known:
    """Bounds of those values that stand in this relation to a number."""
    dtype = step.result.dtype
    tiny = float(torch.finfo(dtype).smallest_normal) * float(torch.finfo(dtype).eps)
    above = limit + tiny if limit == 0 else limit
    why = "values at or below the limit are replaced"
    if relation in ("gt", "ge") or (relation == "ne" and limit == 0 and known.low >= 0):
        low = limit if relation == "ge" else above
        if low > known.low:
            return Known(low=low, high=max(known.high, low), why=why if low > 0 else "")
    if relation in ("lt", "le"):
        return Known(low=known.low, high=max(known.low, min(known.high, limit)))
    return known.plain()


def _compared(step: Step) -> Known:
    limit = step.get(1)
    token = step.of(0).token
    if not token or not isinstance(limit, int | float):
        return TRUTH
    return replace(TRUTH, condition=(token, step.name, float(limit)))


def _filled(step: Step) -> Known:
    values = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "zero": 0.0, "zeros_": 0.0}
    values |= {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
    if step.name in values:
        return exactly(values[step.name])
    return step.of(
        {"scalar_tensor": 0, "fill": 1, "full": 1, "full_like": 1, "new_full": 2}[step.name]
    )


def _arange(step: Step) -> Known:
    found = step.result
    if not found.numel():
        return ANY
    return Known(low=float(found.min()), high=float(found.max()))


def _index(step: Step) -> Known:
    known = step.of(0).plain()
    by_truth = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in step.args[1])
    return replace(known, has_data_size=True) if by_truth else known


MOVEMENTS: dict[str, Rule] = {
    **named(_same, "view", "_unsafe_view", "_reshape_alias", "expand", "unsqueeze", "squeeze"),
    **named(_same, "detach", "alias", "clone", "contiguous", "_to_copy", "lift_fresh"),
    **named(_same, "lift_fresh_copy", "reshape"),
    **named(_moved, "transpose", "permute", "t", "slice", "select", "split", "unbind", "chunk"),
    **named(_moved, "split_with_sizes", "narrow", "as_strided", "diagonal", "unfold", "repeat"),
    **named(_moved, "flip", "roll"),
    **named(_padded, "tril", "triu", "constant_pad_nd"),
    **named(_picked, "topk", "sort", "gather", "index_select", "embedding", "take_along_dim"),
    **named(_joined(0), "cat", "stack", "concat"),
    **named(lambda step: step.of(1).plain(), "copy"),
    **named(_joined(0, 1), "slice_scatter", "select_scatter"),
    **named(_joined(0, 3), "scatter"),
    **named(_joined(0, 2), "masked_scatter"),
    **named(_index_put, "index_put", "_index_put_impl"),
    **named(_added_at, "index_add", "scatter_add"),
    **named(_where, "where"),
    **named(_masked_fill, "masked_fill"),
    **named(_compared, "eq", "ne", "gt", "ge", "lt", "le"),
    **named(_filled, "zeros", "zeros_like", "new_zeros", "zero", "ones", "ones_like", "new_ones"),
    **named(_filled, "full", "full_like", "new_full", "scalar_tensor", "fill"),
    **named(_arange, "arange", "linspace", "eye", "tril_indices", "triu_indices"),
    **named(_index, "index"),
}
"""The rule of each operation."""
