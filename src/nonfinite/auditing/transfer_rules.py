"""How bounds go through each operation: from what is known of operands to the result.

A rule may only say what holds for every value of its operands within their bounds. An operation
without a rule gives unknown values.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nonfinite.auditing.value_ranges import (
    ANY,
    INF,
    SLACK,
    TRUTH,
    Known,
    exactly,
    hull,
    over,
    plus,
    product,
    square,
    summed,
    times,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation below autograd, with what is known of its operands."""

    name: str
    """Name in torch's native library without overload and trailing underscore."""
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Tensor
    known: Callable[[Any], Known]
    """What is known of an argument: a tensor or a number."""

    def of(self, place: int, name: str = "", default: Any = None) -> Known:
        """What is known of an argument by place or name."""
        return self.known(self.get(place, name, default))

    def get(self, place: int, name: str = "", default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def smallest(self) -> float:
        """The smallest normal number of the result's dtype."""
        dtype = self.result.dtype
        return float(torch.finfo(dtype).smallest_normal) if dtype.is_floating_point else 1.0


Rule = Callable[[Step], Known | None]


def transfer(step: Step) -> Known | None:
    """What is known of the result; None if there is no rule."""
    rule = TRANSFERS.get(step.name)
    return None if rule is None else rule(step)


def _same(step: Step) -> Known:
    """Copies, conversions, and views that keep each element where it is."""
    known = step.of(0)
    if step.args[0].shape == step.result.shape:
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


def _add(step: Step) -> Known:
    a, b, alpha = step.of(0), step.of(1), float(step.kwargs.get("alpha", 1) or 1)
    known = plus(a, b, alpha=alpha)
    if step.name == "sub":
        known = plus(a, times(b, exactly(-1.0)), alpha=alpha)
        if b.max_of and b.max_of == a.token and alpha == 1:
            # The maximum itself gives 0.
            return Known(low=known.low, high=min(known.high, 0.0), peak=0.0)
        return known
    grown = next((x for x, y in ((a, b), (b, a)) if x.low >= 0 and y.low >= 0 and alpha > 0), None)
    for x, y in ((a, b), (b, a)):
        if y.low >= 0 and alpha > 0 and (x.mean_square_of or x.sum_of or x.root_of):
            known = replace(
                known, mean_square_of=x.mean_square_of, sum_of=x.sum_of, root_of=x.root_of
            )
    if grown is not None and known.low > 0:
        eps = max(a.low, b.low)
        old = a.why if a.low >= b.low else b.why
        known = replace(known, why=f"{eps:.3g} is added to a value that cannot be negative")
        if old and not isinstance(step.get(1), int | float):
            known = replace(known, why=old)
    return known


def _rsub(step: Step) -> Known | None:
    if step.get(2, "alpha", 1) != 1:
        return None
    return plus(step.of(1), times(step.of(0), exactly(-1.0)))


def _mul(step: Step) -> Known:
    a, b = step.of(0), step.of(1)
    if a.token and a.token == b.token:
        return replace(square(a), square_of=a.token, why=a.why)
    for x, y in ((a, b), (b, a)):
        if y.inverse_of is not None and y.inverse_of[0] == x.token and x.token:
            bound = y.inverse_of[1] * SQUEEZE
            inside = times(x, y)
            return Known(low=max(inside.low, -bound), high=min(inside.high, bound))
    known = times(a, b)
    positive = known.low > 0 and a.low > 0
    return replace(known, why=a.why or b.why) if positive else known


SQUEEZE = 1.5
"""A value divided by its own root mean square may exceed its bound by this factor, by rounding."""


def _div(step: Step) -> Known | None:
    a, b = step.of(0), step.of(1)
    if step.kwargs.get("rounding_mode") is not None:
        return None
    if a.token and a.low >= 0 and b.sum_of == a.token and b.excludes_zero:
        return Known(low=0.0, high=SQUEEZE)
    if a.token and b.root_of is not None and b.root_of[0] == a.token and b.excludes_zero:
        bound = b.root_of[1] * SQUEEZE
        return Known(low=-bound, high=bound)
    known = over(a, b)
    return replace(known, why=a.why) if known.low > 0 else known


def _pow(step: Step) -> Known | None:
    base, power = step.of(0), step.get(1)
    if not isinstance(power, int | float):
        return None
    if power == 2:
        return replace(square(base), square_of=base.token, why=base.why)
    if isinstance(power, int) or float(power).is_integer():
        if power > 0 and int(power) % 2 == 0:
            top = _power(base.size, power)
            least = (
                0.0
                if base.low <= 0 <= base.high
                else _power(min(abs(base.low), abs(base.high)), power)
            )
            return widened(Known(low=least, high=top), smallest=step.smallest)
        if power > 0:
            known = Known(low=_power(base.low, power), high=_power(base.high, power))
            return widened(known, smallest=step.smallest)
    if base.low < 0 or (base.low == 0 and power < 0):
        return None
    ends = sorted((_power(base.low, power), _power(base.high, power)))
    known = replace(widened(Known(low=ends[0], high=ends[1]), smallest=step.smallest), why=base.why)
    if power == -0.5 and base.mean_square_of is not None:
        token, number = base.mean_square_of
        return replace(known, inverse_of=(token, math.sqrt(number)))
    if power == 0.5 and base.mean_square_of is not None:
        token, number = base.mean_square_of
        return replace(known, root_of=(token, math.sqrt(number)))
    return known


def _power(value: float, power: float) -> float:
    try:
        return float(value**power)
    except OverflowError:
        return INF if value > 0 or int(power) % 2 == 0 else -INF
    except ZeroDivisionError:
        return INF


def _sqrt(step: Step) -> Known:
    a = step.of(0)
    known = Known(low=math.sqrt(max(a.low, 0.0)), high=_root(a.high), why=a.why)
    if a.mean_square_of is None:
        return known
    token, number = a.mean_square_of
    return replace(known, root_of=(token, math.sqrt(number)))


def _rsqrt(step: Step) -> Known | None:
    a = step.of(0)
    if a.low <= 0:
        return None
    low = 0.0 if a.high == INF else 1 / math.sqrt(a.high)
    known = widened(Known(low=low, high=1 / math.sqrt(a.low)), smallest=step.smallest)
    if a.mean_square_of is None:
        return known
    token, number = a.mean_square_of
    return replace(known, inverse_of=(token, math.sqrt(number)))


def _root(value: float) -> float:
    return INF if value == INF else math.sqrt(max(value, 0.0))


def _reciprocal(step: Step) -> Known:
    return over(exactly(1.0), step.of(0))


def _rising(function: Callable[[float], float]) -> Rule:
    """A function that never falls, and is not rounded exactly."""

    def rule(step: Step) -> Known:
        a = step.of(0)
        known = Known(low=_at(function, a.low), high=_at(function, a.high))
        if step.name in ("exp", "exp2") and a.peak is not None:
            known = replace(known, peak=_at(function, a.peak) / 2)
        known = widened(known, smallest=step.smallest)
        return replace(known, why="its operand is bounded") if known.low > 0 else known

    return rule


def _at(function: Callable[[float], float], value: float) -> float:
    try:
        return function(value)
    except OverflowError:
        return INF if value > 0 else 0.0
    except ValueError:
        return -INF


def _sigmoid_of(value: float) -> float:
    if value < 0:
        return math.exp(value) / (1 + math.exp(value)) if value > -700 else 0.0
    return 1 / (1 + math.exp(-value))


def _within(low: float, high: float) -> Rule:
    return lambda step: Known(low=low, high=high)


def _sigmoid(step: Step) -> Known:
    a = step.of(0)
    known = Known(low=_sigmoid_of(a.low), high=_sigmoid_of(a.high))
    known = widened(known, smallest=step.smallest)
    why = "its operand is bounded" if known.low > 0 else ""
    return replace(known, high=min(1.0, known.high), why=why)


def _relu(step: Step) -> Known:
    a = step.of(0)
    return Known(low=max(a.low, 0.0), high=max(a.high, 0.0), why=a.why)


def _softplus(step: Step) -> Known:
    beta = abs(float(step.get(1, "beta", 1))) or 1.0
    return Known(low=0.0, high=max(step.of(0).high, 0.0) + 1.0 / beta)


def _gated(step: Step) -> Known:
    """Of silu, gelu and mish: between a small negative number and the operand."""
    return Known(low=-0.5, high=max(step.of(0).high, 0.0))


def _abs(step: Step) -> Known:
    a = step.of(0)
    least = 0.0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high))
    return Known(low=least, high=a.size, why=a.why if least > 0 else "", sum_of=0)


def _neg(step: Step) -> Known:
    return times(step.of(0), exactly(-1.0))


def _clamp(step: Step) -> Known:
    a = step.of(0)
    bottom = step.get(1, "min") if step.name != "clamp_max" else None
    top = step.get(2, "max") if step.name == "clamp" else None
    if step.name == "clamp_max":
        top = step.get(1, "max")
    low, high, why = a.low, a.high, a.why
    if bottom is not None:
        least = step.known(bottom)
        if least.low > low:
            why = f"it is clamped to at least {least.low:.3g}" if least.low > 0 else ""
        low, high = max(low, least.low), max(high, least.high)
    if top is not None:
        most = step.known(top)
        low, high = min(low, most.low), min(high, most.high)
    known = Known(low=low, high=high, why=why if low > 0 else "")
    if top is None:
        # Only greater than before: what bounds the values from below still does.
        return replace(known, mean_square_of=a.mean_square_of, sum_of=a.sum_of, root_of=a.root_of)
    return known


def _extreme(step: Step) -> Known:
    """Elementwise maximum and minimum."""
    a, b = step.of(0), step.of(1)
    pick = max if step.name == "maximum" else min
    low, high = pick(a.low, b.low), pick(a.high, b.high)
    stronger = a if a.low >= b.low else b
    why = "its maximum with a positive number is taken" if low > 0 and not stronger.why else ""
    return Known(low=low, high=high, why=(stronger.why or why) if low > 0 else "")


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
        return _extreme(replace(step, name={"max": "maximum", "min": "minimum"}[step.name]))
    low, is_max = a.low, step.name in ("amax", "max") and step.args[0].dim() > 0
    by_row = is_max and len(step.args) > 1 and _is_last(step)
    if a.peak is not None and by_row:
        low = max(low, a.peak)
    keeps = step.result.dim() == step.args[0].dim()
    why = a.why or ("the largest value is bounded from below" if low > 0 else "")
    token = a.token if by_row and keeps else 0
    return Known(low=low, high=a.high, why=why if low > 0 else "", max_of=token)


def _picked(step: Step) -> Known:
    """Elements of the operand: topk, sort, gather, select and the like."""
    known = step.of(0).plain()
    if step.name != "topk" or not step.get(3, "largest", True):
        return known
    is_last = step.get(2, "dim", -1) in (-1, step.args[0].dim() - 1)
    return replace(known, peak=step.of(0).peak) if is_last else known


def _dropout(step: Step) -> Known:
    rate = float(step.get(1, "p", 0.5))
    return hull(times(step.of(0), exactly(1 / max(1 - rate, 1e-6))), exactly(0.0))


def _added_at(step: Step) -> Known:
    """index_add and scatter_add: each element gets from none to all of the added values."""
    a, source = step.of(0), step.of(3)
    number = max(step.args[2].numel(), 1)
    least = min(product(source.low, number), 0.0) * SLACK
    most = max(product(source.high, number), 0.0) * SLACK
    alpha = float(step.kwargs.get("alpha", 1))
    return plus(a, times(Known(low=least, high=most), exactly(alpha)))


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


def _named(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


TRANSFERS: dict[str, Rule] = {
    **_named(_same, "view", "_unsafe_view", "_reshape_alias", "expand", "unsqueeze", "squeeze"),
    **_named(_same, "detach", "alias", "clone", "contiguous", "_to_copy", "lift_fresh"),
    **_named(_same, "lift_fresh_copy", "reshape"),
    **_named(_moved, "transpose", "permute", "t", "slice", "select", "split", "unbind", "chunk"),
    **_named(_moved, "split_with_sizes", "narrow", "as_strided", "diagonal", "unfold", "repeat"),
    **_named(_moved, "flip", "roll"),
    **_named(_padded, "tril", "triu", "constant_pad_nd"),
    **_named(_add, "add", "sub"),
    **_named(_rsub, "rsub"),
    **_named(_mul, "mul"),
    **_named(_div, "div", "true_divide"),
    **_named(_pow, "pow"),
    **_named(lambda step: square(step.of(0)), "square"),
    **_named(_sqrt, "sqrt"),
    **_named(_rsqrt, "rsqrt"),
    **_named(_reciprocal, "reciprocal"),
    **_named(_rising(math.exp), "exp"),
    **_named(_rising(lambda x: 2.0**x), "exp2"),
    **_named(_rising(math.log), "log"),
    **_named(_rising(lambda x: math.log1p(x)), "log1p"),
    **_named(_sigmoid, "sigmoid"),
    **_named(_within(-1.0, 1.0), "tanh", "sin", "cos", "erf", "sign", "sgn"),
    **_named(_within(-math.pi / 2, math.pi), "acos", "atan", "asin"),
    **_named(_within(-3.2, 3.2), "atan2"),
    **_named(_relu, "relu"),
    **_named(_softplus, "softplus"),
    **_named(_gated, "silu", "gelu", "mish"),
    **_named(_abs, "abs"),
    **_named(_neg, "neg"),
    **_named(_clamp, "clamp", "clamp_min", "clamp_max"),
    **_named(_extreme, "maximum", "minimum"),
    **_named(_sum, "sum"),
    **_named(_mean, "mean"),
    **_named(_amax, "amax", "amin", "max", "min"),
    **_named(_picked, "topk", "sort", "gather", "index_select", "embedding", "take_along_dim"),
    **_named(_softmax, "_softmax", "_safe_softmax"),
    **_named(_log_softmax, "_log_softmax"),
    **_named(_linear(0), "mm", "bmm", "mv", "dot"),
    **_named(_linear(1), "addmm", "baddbmm"),
    **_named(_linear_op, "linear"),
    **_named(_linear(0), "convolution"),
    **_named(_normalised, "native_layer_norm", "_fused_rms_norm", "native_group_norm"),
    **_named(_attention, "_scaled_dot_product_flash_attention_for_cpu"),
    **_named(_attention, "_scaled_dot_product_attention_math"),
    **_named(_joined(0), "cat", "stack", "concat"),
    **_named(lambda step: step.of(1).plain(), "copy"),
    **_named(_joined(0, 1), "slice_scatter", "select_scatter"),
    **_named(_joined(0, 3), "scatter"),
    **_named(_joined(0, 2), "masked_scatter"),
    **_named(_index_put, "index_put", "_index_put_impl"),
    **_named(_added_at, "index_add", "scatter_add"),
    **_named(_cumsum, "cumsum"),
    **_named(_where, "where"),
    **_named(_masked_fill, "masked_fill"),
    **_named(_compared, "eq", "ne", "gt", "ge", "lt", "le"),
    **_named(_filled, "zeros", "zeros_like", "new_zeros", "zero", "ones", "ones_like", "new_ones"),
    **_named(_filled, "full", "full_like", "new_full", "scalar_tensor", "fill"),
    **_named(_arange, "arange", "linspace", "eye", "tril_indices", "triu_indices"),
    **_named(_index, "index"),
    **_named(_dropout, "native_dropout"),
    **_named(_within(0.0, 1.0), "rand", "rand_like", "bernoulli"),
    **_named(_within(0.0, INF), "bincount", "histc"),
    **_named(_norm, "linalg_vector_norm", "norm"),
}
"""The rule of each operation."""

IN_ALL_RESULTS = ("split", "split_with_sizes", "unbind", "chunk")
"""Operations all of whose results follow the rule; of others the first alone does."""
