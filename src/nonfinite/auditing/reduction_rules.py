"""Bounds of sums, norms, softmax and products of matrices, and the guards that rest on them."""

import math
from dataclasses import replace

from torch import Tensor

from nonfinite.auditing.elementwise_rules import SQUEEZE, extreme
from nonfinite.auditing.value_ranges import (
    ANY,
    INF,
    SLACK,
    Known,
    Rule,
    Step,
    exactly,
    hull,
    named,
    plus,
    product,
    summed,
    times,
    widened,
)


def _reduced(step: Step) -> float:
    """How many elements each element of the result is made from."""
    return step.args[0].numel() / max(step.result.numel(), 1)


def _is_last(step: Step) -> bool:
    """Whether the last dimension alone is reduced."""
    dims = step.get(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    return bool(dims) and [d % step.args[0].dim() for d in dims] == [step.args[0].dim() - 1]


def _sum(step: Step) -> Known:
    a = step.of(0)
    number = _reduced(step)
    known = summed(a if _is_last(step) else replace(a, peak=None), max(number, 1.0))
    if number < 1 or a.has_data_size:
        return hull(known, exactly(0.0))
    is_nonnegative = a.low >= 0
    keeps = step.result.dim() == step.args[0].dim()
    peaked = is_nonnegative and known.low > 0 and a.low <= 0
    why = "the largest of the summed values is bounded from below" if peaked else a.why
    return replace(
        known,
        why=why if known.low > 0 else "",
        mean_square_of=(a.square_of, 1.0) if a.square_of and keeps else None,
        sum_of=a.token if is_nonnegative and keeps else 0,
    )


def _mean(step: Step) -> Known:
    a, number = step.of(0), _reduced(step)
    if number < 1:
        return ANY
    low = a.low / 2 if a.low > 0 else a.low * 1.01
    high = a.high * 1.01 if a.high > 0 else a.high
    keeps = step.result.dim() == step.args[0].dim()
    # Without keepdim, broadcasting could pair a mean with values of another row.
    related = (a.square_of, number) if a.square_of and keeps else None
    return Known(low=low, high=high, why=a.why if low > 0 else "", mean_square_of=related)


def _amax(step: Step) -> Known:
    a = step.of(0)
    if len(step.args) > 1 and isinstance(step.args[1], Tensor):
        return extreme(replace(step, name={"max": "maximum", "min": "minimum"}[step.name]))
    low, is_max = a.low, step.name in ("amax", "max") and step.args[0].dim() > 0
    by_row = is_max and len(step.args) > 1 and _is_last(step)
    if a.peak is not None and by_row:
        low = max(low, a.peak)
    keeps = step.result.dim() == step.args[0].dim()
    why = a.why or ("the largest value is bounded from below" if low > 0 else "")
    token = a.token if by_row and keeps else 0
    return Known(low=low, high=a.high, why=why if low > 0 else "", max_of=token)


def _softmax(step: Step) -> Known:
    dim = step.get(1, "dim", -1)
    is_last = dim in (-1, step.args[0].dim() - 1)
    size = step.args[0].shape[dim] if step.args[0].dim() else 1
    low = step.of(0)
    floor = math.exp(low.low - low.high) / size if low.is_bounded else 0.0
    known = widened(Known(low=floor, high=0.51), smallest=step.smallest)
    why = "its operand is bounded" if known.low > 0 else ""
    return Known(low=known.low, high=1.01, why=why, peak=0.9 / size if is_last else None)


def _log_softmax(step: Step) -> Known:
    a = step.of(0)
    size = step.args[0].shape[step.get(1, "dim", -1)]
    width = a.high - a.low if a.is_bounded else INF
    return Known(low=-1.01 * width - math.log(max(size, 1)) - 1, high=0.0)


def _linear(first: int) -> Rule:
    """Products of matrices, of which the first stands at this place."""

    def rule(step: Step) -> Known:
        a, b = step.of(first), step.of(first + 1)
        left = step.args[first]
        terms = left.shape[-1] if step.name != "convolution" else step.args[1][0].numel()
        known = summed(times(a, b), max(terms, 1))
        if step.name == "convolution":
            # Padding adds zeros.
            known = hull(known, exactly(0.0))
            return plus(known, step.of(2)) if step.args[2] is not None else known
        if not first:
            return known
        beta, alpha = step.kwargs.get("beta", 1), step.kwargs.get("alpha", 1)
        return plus(times(step.of(0), exactly(float(beta))), times(known, exactly(float(alpha))))

    return rule


def _linear_op(step: Step) -> Known:
    known = summed(times(step.of(0), step.of(1)), step.args[0].shape[-1])
    return plus(known, step.of(2)) if step.get(2, "bias") is not None else known


def _normalised(step: Step) -> Known | None:
    """Layer, RMS, group and batch norm in training: at most the root of the number of elements."""
    if step.name == "native_layer_norm":
        size, scale, shift = math.prod(step.args[1]), step.args[2], step.args[3]
    elif step.name == "_fused_rms_norm":
        size, scale, shift = math.prod(step.args[1]), step.get(2, "weight"), None
    elif step.name == "native_group_norm":
        scale, shift = step.args[1], step.args[2]
        size = step.args[0].numel() // max(step.args[3] * step.args[6], 1)
    else:
        return None
    bound = math.sqrt(max(size, 1)) * SQUEEZE
    known = Known(low=-bound, high=bound)
    known = times(known, step.known(scale)) if scale is not None else known
    return plus(known, step.known(shift)) if shift is not None else known


def _attention(step: Step) -> Known:
    """Each output is a weighted mean of the values; dropout makes the weights larger."""
    rate = step.get(3 if "flash" in step.name else 4, "dropout_p", 0.0)
    scale = 1.01 / max(1 - (rate if isinstance(rate, float) else 0.0), 1e-6)
    return times(hull(step.of(2), exactly(0.0)), exactly(scale))


def _cumsum(step: Step) -> Known:
    a = step.of(0)
    whole = summed(replace(a, peak=None), max(step.args[0].numel(), 1))
    return hull(whole, a.plain())


def _norm(step: Step) -> Known:
    a = step.of(0)
    order = step.get(1, "ord", 2)
    number = max(_reduced(step), 1.0)
    if order != 2 or not isinstance(order, int | float):
        return Known(low=0.0)
    keeps = step.result.dim() == step.args[0].dim()
    root = (a.token, 1.0) if a.token and keeps else None
    return Known(low=0.0, high=product(a.size, math.sqrt(number)) * SLACK, root_of=root)


REDUCTIONS: dict[str, Rule] = {
    **named(_sum, "sum"),
    **named(_mean, "mean"),
    **named(_amax, "amax", "amin", "max", "min"),
    **named(_softmax, "_softmax", "_safe_softmax"),
    **named(_log_softmax, "_log_softmax"),
    **named(_linear(0), "mm", "bmm", "mv", "dot"),
    **named(_linear(1), "addmm", "baddbmm"),
    **named(_linear_op, "linear"),
    **named(_linear(0), "convolution"),
    **named(_normalised, "native_layer_norm", "_fused_rms_norm", "native_group_norm"),
    **named(_attention, "_scaled_dot_product_flash_attention_for_cpu"),
    **named(_attention, "_scaled_dot_product_attention_math"),
    **named(_cumsum, "cumsum"),
    **named(_norm, "linalg_vector_norm", "norm"),
}
"""The rule of each operation."""
