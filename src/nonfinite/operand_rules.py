"""How an operation made a non-finite value: a rule for each family, on the values of its operands.

A rule looks at the operands where the result is not finite. Names of operations only choose the
rule; what it says follows from the numbers. A rule that the numbers do not confirm says nothing.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from nonfinite.finite_checks import absmax, all_finite, any_nan, tensors_in
from nonfinite.mechanisms import (
    CTC,
    DOMAIN,
    EDGE,
    EMPTY,
    EXP,
    GIVEN,
    HALF,
    INF_INF,
    LOG,
    MASKED,
    NO_LABEL,
    ONE,
    OVERFLOW,
    POINTS,
    TINY,
    ZERO,
    ZERO_INF,
    Call,
    Explanation,
    half_note,
    has_infinity,
    largest_number,
    share,
    shown,
)

Rule = Callable[[Call], Explanation | None]


def explain(call: Call) -> Explanation | None:
    """The mechanism and a sentence about the operand; None if the operands do not say."""
    try:
        rule = RULES.get(call.name)
        said = None if rule is None else rule(call)
        said = said or _empty(call) or _overflow(call)
    # Operands of an unknown kind must not hide the finding itself.
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    if said is None:
        return None
    if said[0] == ZERO and re.search(r"cross_entropy|nll_loss", call.function):
        return NO_LABEL, "no target of the batch counts, so the mean divides 0 by 0"
    return _in_derivative(call, said) if call.is_derivative else said


def _in_derivative(call: Call, said: Explanation) -> Explanation:
    """What a mechanism means inside the derivative of an operation."""
    name = re.sub(r"Backward\d+$", "", call.node or "")
    plain = name.lower().removeprefix("linalg")
    if said[0] in (ZERO, LOG) and plain in ("log", "log2", "log10", "log1p", "xlogy"):
        return LOG, f"the derivative of {plain} at 0 is infinite, even if its result is not used"
    if said[0] in (ZERO, LOG, DOMAIN, TINY, ZERO_INF) and plain not in ("div", "reciprocal"):
        if plain in ("eigh", "svd", "eig", "qr"):
            return EDGE, f"the derivative of {plain} is infinite for repeated or zero values"
        if plain in POINTS:
            return EDGE, f"the derivative of {plain} is infinite at its operand {POINTS[plain]}"
        return EDGE, f"the derivative of {plain} divides by 0 at its operand"
    if said[0] == ZERO:
        return ZERO, f"the derivative of {plain} divides by 0, even if its result is not used"
    return said


def _zero_divisor(call: Call, top: Any, bottom: Any) -> Explanation | None:
    below, above = call.there(bottom), call.there(top)
    if bool((below == 0).any()):
        both = bool((above[below == 0] == 0).any()) if above.numel() == below.numel() else False
        what = " (0/0)" if both else ""
        return ZERO, f"the divisor is 0{what} for {share(call)}{half_note(call)}"
    if bool((below.abs() < 1).all()) and absmax([above]) < largest_number(call) ** 0.5:
        return TINY, f"the divisor is {shown(below.abs(), below == below)} for {share(call)}"
    return None


def _div(call: Call) -> Explanation | None:
    return _zero_divisor(call, call.args[0], call.args[1])


def _addcdiv(call: Call) -> Explanation | None:
    return _zero_divisor(call, call.args[1], call.args[2])


def _reciprocal(call: Call) -> Explanation | None:
    value = call.there(call.args[0])
    if call.name == "rsqrt" and bool((value < 0).any()):
        return DOMAIN, f"the operand of rsqrt is {shown(value, value < 0)}, below 0"
    return _zero_divisor(call, 1.0, call.args[0])


def _log(call: Call) -> Explanation | None:
    place = 1 if call.name in ("xlogy", "special_xlog1py") else 0
    value = call.there(call.args[place]) + (1 if call.name in ("log1p", "special_xlog1py") else 0)
    if bool((value < 0).any()):
        return DOMAIN, f"the operand of {call.name} is {shown(value, value < 0)}, below 0"
    if bool((value == 0).any()):
        return LOG, f"the operand of {call.name} is 0 for {share(call)}{half_note(call)}"
    return None


def _logit(call: Call) -> Explanation | None:
    value = call.there(call.args[0])
    if bool(((value == 0) | (value == 1)).any()):
        return LOG, f"the operand of logit is {shown(value, value == value)}"
    return DOMAIN, f"the operand of logit is {shown(value, value == value)}, not within 0 and 1"


def _bounded(low: float, high: float) -> Rule:
    def rule(call: Call) -> Explanation | None:
        value = call.there(call.args[0])
        out = (value < low) | (value > high)
        if bool(out.any()):
            return DOMAIN, f"the operand of {call.name} is {shown(value, out)}"
        edge = (value == low) | (value == high)
        if bool(edge.any()):
            at = shown(value, edge)
            return DOMAIN, f"the operand of {call.name} is {at}, where it is infinite"
        return None

    return rule


def _pow(call: Call) -> Explanation | None:
    base, power = call.there(call.args[0]), call.there(call.args[1]).to(torch.float64)
    if bool(((base == 0) & (power < 0)).any()):
        return ZERO, f"0 is raised to a negative power for {share(call)}"
    if bool(((base < 0) & (power != power.round())).any()):
        return DOMAIN, f"{shown(base, base < 0)} is raised to a fractional power"
    return None


def _large_power(call: Call) -> Explanation | None:
    base, power = (call.there(value).to(torch.float64) for value in call.args[:2])
    if not bool((power * base.abs().log() >= math.log(largest_number(call))).all()):
        return None
    what = f"{shown(base, base == base)} to the power of {shown(power, power == power)} gives"
    return _too_large(call, what)


def _exp(call: Call) -> Explanation | None:
    place = -1 if call.name == "pow" else 0
    value = torch.as_tensor(call.there(call.args[place]), dtype=torch.float64)
    # e^x, 2^x and sinh(x) overflow at operands of the size of the exponent's range.
    limit = 0.4 * math.log2(largest_number(call))
    size = value.abs() if call.name in ("sinh", "cosh") else value
    if not bool((size > limit).all()):
        return None
    above = f"; it overflows above {math.log(largest_number(call)):.1f}"
    largest = f"the operand of {call.name} is {size.max().item():.4g}"
    return EXP, largest + (above if call.name in ("exp", "expm1") else "")


def _product(call: Call) -> Explanation | None:
    operands = [*call.args, *call.kwargs.values()]
    if not any_nan([call.result]) or not any(has_infinity(value) for value in operands):
        return None
    if _zero_meets_infinity(call):
        return ZERO_INF, f"0 is multiplied by an infinity for {share(call)}"
    return INF_INF, f"products that are infinities of both signs are added, for {share(call)}"


def _zero_meets_infinity(call: Call) -> bool:
    """Whether a 0 of one factor is multiplied by an infinity of the other."""
    place = 1 if call.name.startswith(("addmm", "addbmm", "addcmul", "baddbmm")) else 0
    factors = [torch.as_tensor(factor) for factor in call.args[place : place + 2]]
    zeros = [(factor == 0).float() for factor in factors]
    infinities = [factor.isinf().float() for factor in factors]
    pairs = ((zeros[0], infinities[1]), (infinities[0], zeros[1]))
    if call.name in ("mul", "addcmul"):
        return any(bool((one * other).any()) for one, other in pairs)
    if call.name == "convolution":
        more = call.args[3:]
        return any(
            bool(torch.ops.aten.convolution(one, other, None, *more).any()) for one, other in pairs
        )
    if call.name == "linear":
        return any(bool((one @ other.T).any()) for one, other in pairs)
    return any(bool((one @ other).any()) for one, other in pairs)


def _sum(call: Call) -> Explanation | None:
    operands = [*call.args, *call.kwargs.values()]
    if any_nan([call.result]) and any(has_infinity(value) for value in operands):
        return INF_INF, f"two infinities cancel, which is undefined, for {share(call)}"
    return None


def _empty(call: Call) -> Explanation | None:
    """A mean, or a loss with one, over no element."""
    operands = [t for t in tensors_in((list(call.args), call.kwargs)) if t.is_floating_point()]
    if not operands or operands[0].numel() or not any_nan([call.result]):
        return None
    return EMPTY, f"the mean is over no element (shape {list(operands[0].shape)})"


def _pole(call: Call) -> Explanation | None:
    value = call.there(call.args[0])
    pole = (value <= 0) & (value == value.round())
    if not bool(pole.any()):
        return None
    return DOMAIN, f"the operand of {call.name} is {shown(value, pole)}, where it is infinite"


def _softmax(call: Call) -> Explanation | None:
    dims = call.get(1, "dim", -1)
    hidden = (call.args[0].detach() == -torch.inf).all(dim=dims)
    if bool(hidden.any()):
        return MASKED, f"{int(hidden.sum())} of {hidden.numel()} rows hold nothing but -inf"
    return None


def _attention(call: Call) -> Explanation | None:
    keys = call.args[1].shape[-2]
    for mask in tensors_in((call.args[3:], call.kwargs)):
        if mask.dim() < 2 or mask.shape[-1] != keys:
            continue
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        rows = hidden.all(dim=-1)
        if bool(rows.any()):
            return MASKED, f"{int(rows.sum())} of {rows.numel()} rows of the mask hide every key"
    return None


def _nll(call: Call) -> Explanation | None:
    target, weight, ignored = call.args[1], call.args[2], call.get(4, "ignore_index", -100)
    valid = target != ignored
    if not bool(valid.any()):
        what = "empty" if not target.numel() else f"{ignored}, which is ignored"
        return NO_LABEL, f"every target is {what}, so the mean divides 0 by 0"
    if weight is not None and not all_finite([weight[target[valid]]]):
        number = int((~weight.isfinite()).nonzero()[0])
        return GIVEN, f"the weight of class {number} is {weight[number].item()}"
    if weight is not None and not bool(weight[target[valid]].any()):
        return NO_LABEL, "the class weights of all targets are 0, so the mean divides 0 by 0"
    return None


def _ctc(call: Call) -> Explanation | None:
    lengths, targets = (torch.as_tensor(call.args[place]).cpu() for place in (2, 3))
    longer = (targets > lengths).nonzero().flatten()
    if len(longer):
        row = int(longer[0])
        return CTC, f"row {row}: {int(targets[row])} labels and {int(lengths[row])} steps of input"
    rows = call.args[1].cpu()
    if rows.dim() == 1:
        rows = torch.nn.utils.rnn.pad_sequence(rows.split(targets.tolist()), batch_first=True)
    for row, (labels, length) in enumerate(zip(rows, targets.tolist(), strict=True)):
        # Two equal labels in a row need a blank between them.
        needed = length + int((labels[1:length] == labels[: max(length - 1, 0)]).sum())
        if needed > int(lengths[row]):
            return CTC, f"row {row} needs {needed} steps of input and has {int(lengths[row])}"
    return None


def _mean(call: Call) -> Explanation | None:
    if call.args[0].numel() == 0:
        return EMPTY, f"the mean is over no element (shape {list(call.args[0].shape)})"
    return _sum(call)


def _std(call: Call) -> Explanation | None:
    tensor, last = call.args[0], call.kwargs.get("correction")
    correction = 1 if last is None else last
    number = tensor.numel() // max(call.result.numel(), 1)
    if number <= correction:
        elements = "one element" if number == 1 else f"{number} elements"
        return ONE, f"{call.name} of {elements} with a correction of {correction} divides by 0"
    return None


def _normalisation(call: Call) -> Explanation | None:
    epsilons = [value for value in call.args if isinstance(value, float)]
    if epsilons and epsilons[-1] == 0.0 and absmax([call.args[0]]) < largest_number(call) ** 0.4:
        return ZERO, "the variance is 0, and so is eps"
    return None


def _weight_norm(call: Call) -> Explanation | None:
    others = [dim for dim in range(call.args[0].dim()) if dim != call.get(2, "dim", 0)]
    zero = call.args[0].norm(dim=others) == 0
    if not bool(zero.any()):
        return None
    return ZERO, f"the norm of {int(zero.sum())} of {zero.numel()} rows, which is divided by, is 0"


def _determinant(call: Call) -> Explanation | None:
    return LOG, "the determinant is 0"


def _overflow(call: Call) -> Explanation | None:
    """Finite operands whose products or sums exceed the largest number of the result's dtype."""
    operands = tensors_in((list(call.args), call.kwargs))
    numbers = [t for t in operands if t.is_floating_point()]
    if not numbers or has_infinity(operands) or any_nan(numbers):
        return None
    limit, size = largest_number(call), max(absmax([t]) for t in numbers)
    longest = max(2, max(t.shape[-1] if t.dim() else 1 for t in numbers))
    if call.name in ("sum", "mean", "cumsum"):
        longest = max(2, numbers[0].numel())
    if call.name.startswith("convolution"):
        longest = max(t.numel() for t in numbers)
    terms = size if call.name in ("_to_copy", "copy", "add", "sub") else max(size, size**2)
    scalars = [abs(float(v)) for v in call.args if isinstance(v, int | float)]
    if terms * longest * max([1.0, *scalars]) <= limit:
        return None
    what = f"operands up to {size:.4g} give"
    if call.name in ("sum", "mean", "cumsum"):
        what = f"the sum over {numbers[0].numel()} elements up to {size:.4g} gives"
    return _too_large(call, what)


def _too_large(call: Call, what: str) -> Explanation:
    if call.result.dtype == torch.float16:
        return HALF, f"{what} more than 65504, the largest float16"
    name = str(call.result.dtype).removeprefix("torch.")
    return OVERFLOW, f"{what} more than {largest_number(call):.3g}, the largest {name}"


def _named(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


RULES: dict[str, Rule] = {
    **_named(_div, "div", "true_divide", "floor_divide", "fmod", "remainder"),
    **_named(_addcdiv, "addcdiv"),
    **_named(_reciprocal, "reciprocal", "rsqrt"),
    **_named(_log, "log", "log2", "log10", "log1p", "xlogy", "special_xlog1py"),
    **_named(_logit, "logit"),
    **_named(_bounded(0, math.inf), "sqrt"),
    **_named(_bounded(-1, 1), "acos", "asin", "atanh", "erfinv"),
    **_named(_bounded(1, math.inf), "acosh"),
    **_named(lambda call: _pow(call) or _exp(call) or _large_power(call), "pow"),
    **_named(_exp, "exp", "expm1", "exp2", "sinh", "cosh", "i0", "special_i0", "special_i1"),
    **_named(_product, "mul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "dot", "mv", "addcmul"),
    **_named(_product, "convolution", "linear", "matmul"),
    **_named(_sum, "add", "sub", "rsub", "sum", "cumsum", "lerp"),
    **_named(_softmax, "_softmax", "_log_softmax", "_safe_softmax", "logsumexp"),
    **_named(_attention, "_scaled_dot_product_flash_attention_for_cpu"),
    **_named(_attention, "_scaled_dot_product_efficient_attention"),
    **_named(_attention, "_scaled_dot_product_cudnn_attention"),
    **_named(_attention, "_scaled_dot_product_attention_math"),
    **_named(_nll, "nll_loss_forward", "nll_loss2d_forward"),
    **_named(_ctc, "_ctc_loss", "_cudnn_ctc_loss"),
    **_named(_mean, "mean"),
    **_named(_std, "std", "var", "std_mean", "var_mean"),
    **_named(_normalisation, "native_layer_norm", "native_group_norm", "native_batch_norm"),
    **_named(_normalisation, "_fused_rms_norm", "_native_batch_norm_legit"),
    **_named(_weight_norm, "_weight_norm_interface"),
    **_named(_determinant, "_linalg_slogdet", "linalg_slogdet", "scalar_tensor"),
    **_named(_pole, "lgamma", "digamma"),
}
"""The rule of each operation; an operation without one is only checked for overflow."""
