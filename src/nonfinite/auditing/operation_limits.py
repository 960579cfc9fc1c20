"""Which operations have a limit, how near a value is to it, and when it can never be reached.

The limits have the names of `nonfinite.mechanisms`, so that what an audit foresees and what a trace
finds are told in the same words.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonfinite import mechanisms as how
from nonfinite.auditing.value_ranges import Known, Step, largest


@dataclass(frozen=True, kw_only=True)
class Check:
    """The limit of one operation, for the values that it has here and for all in range."""

    limit: str
    """A mechanism of `nonfinite.mechanisms`."""
    doublings: float
    """Factors of two between the value nearest to the limit and the limit; inf if there is none."""
    reason: str | None
    """Why the limit can never be reached; None if that is not proved."""


CheckRule = Callable[[Step, str | None], list[Check]]


def checks_of(step: Step, node: str | None) -> list[Check]:
    """The limits of an operation; empty if it has none.

    Args:
        step: the operation.
        node: the node of the graph whose derivative ran it; None in a forward pass.
    """
    rule = CHECKS.get(step.name)
    return [] if rule is None else rule(step, node)


def _away_from_zero(value: Any, dtype: torch.dtype) -> float:
    """Doublings between the smallest absolute value and the smallest normal number."""
    if not isinstance(value, Tensor):
        return math.inf
    if not value.numel():
        return math.inf
    smallest = float(value.detach().abs().min())
    if not value.is_floating_point():
        return math.inf if smallest else 0.0
    tiny = float(torch.finfo(dtype).smallest_normal)
    return max(math.log2(smallest / tiny), 0.0) if smallest > 0 else 0.0


def _positive(known: Known) -> str | None:
    if known.low > 0:
        return known.why or f"it is at least {known.low:.3g}"
    return "it is always negative" if known.high < 0 else None


GRADIENT = 1024.0
"""Gradients up to this are assumed to arrive: what a derivative divides by must be larger."""


def _bounds_slope(known: Known, power: float, dtype: torch.dtype, node: str | None) -> bool:
    """Whether a derivative that has a value to a negative power is finite for such gradients."""
    if node is None:
        return True
    least = known.low if known.low > 0 else -known.high
    return least > 0 and math.log2(GRADIENT) + power * math.log2(least) < math.log2(largest(dtype))


def _divisor(place: int) -> CheckRule:
    def rule(step: Step, node: str | None) -> list[Check]:
        bottom = step.get(place)
        if not isinstance(bottom, Tensor):
            return []
        limit = how.ZERO
        if node is not None and re.match(r"(Div|Reciprocal)", node) is None:
            limit = how.EDGE
        far = _away_from_zero(bottom, step.result.dtype)
        known = step.known(bottom)
        fits = _bounds_slope(known, -1.0, step.result.dtype, node)
        return [Check(limit=limit, doublings=far, reason=_positive(known) if fits else None)]

    return rule


def _above(bound: float, limit: str, *, may_touch: bool = False) -> CheckRule:
    """An operand that must be above a bound."""

    def rule(step: Step, node: str | None) -> list[Check]:
        value, known = step.args[0], step.of(0)
        if not isinstance(value, Tensor) or not value.numel():
            return []
        here = how.EDGE if node is not None and limit != how.LOG else limit
        least = float(value.detach().min())
        fits = known.low >= bound if may_touch else known.low > bound
        if not may_touch:
            fits = fits and _bounds_slope(known, -0.5, step.result.dtype, node)
        tiny = float(torch.finfo(step.result.dtype).smallest_normal)
        far = max(math.log2(max(least - bound, tiny) / tiny), 0.0)
        reason = None
        if fits:
            reason = known.why or f"it is at least {known.low:.3g}"
        return [Check(limit=here, doublings=far, reason=reason)]

    return rule


def _between(low: float, high: float, *, may_touch: bool) -> CheckRule:
    def rule(step: Step, node: str | None) -> list[Check]:
        known, value = step.of(0), step.args[0].detach()
        inside = low <= known.low and known.high <= high
        strictly = low < known.low and known.high < high
        edge = max(abs(low), abs(high))
        size = float(value.abs().max()) if value.numel() else 0.0
        far = math.log2(edge / size) if size > 0 else math.inf
        proved = inside if may_touch else strictly
        reason = f"it is within {known.low:.3g} and {known.high:.3g}" if proved else None
        return [Check(limit=how.DOMAIN, doublings=max(far, 0.0), reason=reason)]

    return rule


def _exponent(step: Step, node: str | None) -> list[Check]:
    value = step.args[-1] if step.name == "pow" else step.args[0]
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return []
    base = {"exp2": 2.0}.get(step.name, math.e)
    if step.name == "pow" and isinstance(step.args[0], int | float) and step.args[0] > 1:
        base = float(step.args[0])
    limit = math.log(largest(step.result.dtype)) / math.log(base)
    size = float(value.detach().max())
    far = math.log2(limit / size) if size > 0 else math.inf
    high = step.known(value).high
    reason = f"its operand is at most {high:.3g}" if high < limit * 0.99 else None
    return [Check(limit=how.EXP, doublings=max(far, 0.0), reason=reason)]


def _pow(step: Step, node: str | None) -> list[Check]:
    base, power = step.args[0], step.get(1)
    if not isinstance(base, Tensor):
        return _exponent(step, node)
    if not isinstance(power, int | float):
        return [Check(limit=how.DOMAIN, doublings=_away_from_zero(base, base.dtype), reason=None)]
    if power < 0:
        limit = how.ZERO if node is None else how.EDGE
        known = step.of(0)
        is_fraction = not float(power).is_integer()
        fits = _bounds_slope(known, power, step.result.dtype, node)
        reason = None if (is_fraction and known.low <= 0) or not fits else _positive(known)
        far = _away_from_zero(base, step.result.dtype)
        return [Check(limit=limit, doublings=far, reason=reason)]
    if not float(power).is_integer():
        return _above(0.0, how.DOMAIN, may_touch=True)(step, node)
    return []


def _softmax(step: Step, node: str | None) -> list[Check]:
    reason = None
    if step.of(0).low > -math.inf:
        reason = "its input holds no -inf, and the maximum is subtracted"
    return [Check(limit=how.MASKED, doublings=math.inf, reason=reason)]


def _labels(step: Step, node: str | None) -> list[Check]:
    # reduction 1 is the mean over the labels that count.
    if step.get(3, "reduction", 1) != 1:
        return []
    return [Check(limit=how.NO_LABEL, doublings=math.inf, reason=None)]


def _deviation(step: Step, node: str | None) -> list[Check]:
    last = step.kwargs.get("correction")
    correction = 1 if last is None else last
    number = step.args[0].numel() // max(step.result.numel(), 1)
    if step.of(0).has_data_size:
        return [Check(limit=how.ONE, doublings=math.inf, reason=None)]
    far = math.inf if number > correction else 0.0
    # The elements may be the rows of a batch.
    reason = f"it has {number} elements" if number // step.rows > correction else None
    return [Check(limit=how.ONE, doublings=far, reason=reason)]


def _mean(step: Step, node: str | None) -> list[Check]:
    if not step.of(0).has_data_size:
        return []
    return [Check(limit=how.EMPTY, doublings=math.inf, reason=None)]


def _normalisation(step: Step, node: str | None) -> list[Check]:
    numbers = [value for value in step.args if isinstance(value, float)]
    epsilon = numbers[-1] if numbers else step.kwargs.get("eps")
    # Inside, 1 / sqrt(epsilon) is kept in the dtype of the result.
    top = min(largest(step.result.dtype), largest(torch.float32))
    reason = None
    if epsilon is None and step.name == "_fused_rms_norm":
        reason = "its epsilon is that of the dtype"
    elif epsilon is not None and epsilon > 0 and epsilon**-0.5 < top / 2:
        reason = f"its epsilon of {epsilon:.3g} bounds the reciprocal of the root"
    return [Check(limit=how.ZERO, doublings=math.inf, reason=reason)]


def _matrix(step: Step, node: str | None) -> list[Check]:
    return [Check(limit=how.DOMAIN, doublings=math.inf, reason=None)]


def _infinities(step: Step, node: str | None) -> list[Check]:
    """Infinities of masks that may cancel, or be multiplied by 0."""
    if node is not None:
        return []
    both = [step.of(0), step.of(1)]
    infinite = [known.low == -math.inf or known.high == math.inf for known in both]
    if step.name == "mul":
        other = both[1] if infinite[0] else both[0]
        is_met = any(infinite) and not other.excludes_zero
        return [Check(limit=how.ZERO_INF, doublings=math.inf, reason=None)] if is_met else []
    return [Check(limit=how.INF_INF, doublings=math.inf, reason=None)] if all(infinite) else []


def overflow(step: Step, bound: float) -> Check | None:
    """The limit of a result's dtype; None for operations that only move numbers.

    Args:
        step: the operation.
        bound: the largest absolute value of the result that is possible, before rounding.
    """
    if step.name not in GROWS or not step.result.is_floating_point() or not step.result.numel():
        return None
    top = largest(step.result.dtype)
    sizes = step.result.detach().abs()
    size = float(torch.where(sizes.isfinite(), sizes, 0.0).max())
    far = math.log2(top / size) if size > 0 else math.inf
    name = str(step.result.dtype).removeprefix("torch.")
    limit = how.HALF if step.result.dtype == torch.float16 else how.OVERFLOW
    reason = f"it is at most {bound:.3g}, below the largest {name}" if bound < top else None
    return Check(limit=limit, doublings=max(far, 0.0), reason=reason)


GROWS = (
    frozenset(
        ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linear", "convolution", "mul", "add", "sub")
    )
    | frozenset(
        ("sum", "cumsum", "square", "pow", "addcmul", "index_add", "scatter_add", "_to_copy")
    )
    | frozenset(("div", "true_divide", "reciprocal", "rsqrt"))
)
"""Operations whose result can be larger than their operands."""


def _named(rule: CheckRule, *names: str) -> dict[str, CheckRule]:
    return dict.fromkeys(names, rule)


CHECKS: dict[str, CheckRule] = {
    **_named(_divisor(1), "div", "true_divide", "fmod", "remainder", "floor_divide"),
    **_named(_divisor(2), "addcdiv"),
    **_named(_divisor(0), "reciprocal"),
    **_named(_above(0.0, how.ZERO), "rsqrt"),
    **_named(_above(0.0, how.LOG), "log", "log2", "log10"),
    **_named(_above(-1.0, how.LOG), "log1p"),
    **_named(_above(0.0, how.DOMAIN, may_touch=True), "sqrt"),
    **_named(_above(0.0, how.DOMAIN), "lgamma", "digamma"),
    **_named(_between(-1.0, 1.0, may_touch=True), "acos", "asin"),
    **_named(_between(-1.0, 1.0, may_touch=False), "atanh", "erfinv"),
    **_named(_infinities, "add", "sub", "mul"),
    **_named(_exponent, "exp", "exp2", "expm1", "sinh", "cosh"),
    **_named(_pow, "pow"),
    **_named(_softmax, "_softmax", "_log_softmax"),
    **_named(_labels, "nll_loss_forward", "nll_loss2d_forward"),
    **_named(_deviation, "std", "var", "std_mean", "var_mean"),
    **_named(_mean, "mean"),
    **_named(_normalisation, "native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    **_named(_normalisation, "native_batch_norm", "_native_batch_norm_legit"),
    **_named(_matrix, "_linalg_svd", "_linalg_eigh", "linalg_inv_ex", "linalg_cholesky_ex"),
    **_named(_matrix, "_linalg_slogdet", "_linalg_det", "logit", "xlogy", "_ctc_loss"),
}
"""The limits of each operation; those of the backward pass are in the operations it runs."""

ADVICE = {
    how.ZERO: "add an epsilon that is not 0 in this dtype, or clamp the divisor from below",
    how.TINY: "clamp the divisor from below",
    how.LOG: "clamp the operand from below, or compute in logarithms (log_softmax, logsigmoid)",
    how.DOMAIN: "clamp the operand into its domain before the operation; of a root or log, above 0",
    how.EDGE: "add a small epsilon to the operand (not to the result), or clamp it from below",
    how.EXP: "clamp the exponent, or subtract the maximum first",
    how.MASKED: "keep one entry of each row unmasked, or mask with a large negative number",
    how.NO_LABEL: "skip batches without a valid label, or divide by max(number of labels, 1)",
    how.EMPTY: "skip the term if there is no element",
    how.ONE: "use correction=0, or skip groups with one element",
    how.HALF: "compute this operation in float32",
    how.OVERFLOW: "bound the operands (a norm, a clamp, a soft-cap)",
    how.ZERO_INF: "replace the infinite operand before it is multiplied",
    how.INF_INF: "use a large negative number in place of -inf",
    how.CTC: "use zero_infinity=True, or leave such rows out",
}
"""The usual fix of each limit, in one line."""
