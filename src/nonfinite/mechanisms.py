"""How an operation made a non-finite value: a rule for each family, on the values of its operands.

A rule looks at the operands where the result is not finite. Names of operations only choose the
rule; what it says follows from the numbers. A rule that the numbers do not confirm says nothing.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonfinite.finite_checks import absmax, any_nan, can_be_nonfinite, tensors_in

ZERO = "division by zero"
TINY = "division by a tiny number"
LOG = "log of zero"
DOMAIN = "outside the domain"
EDGE = "infinite slope at the edge of the domain"
EXP = "exp overflow"
ZERO_INF = "zero times infinity"
INF_INF = "infinity minus infinity"
MASKED = "fully masked row"
NO_LABEL = "no valid label"
CTC = "CTC target longer than its input"
EMPTY = "mean of an empty tensor"
ONE = "std of one element"
HALF = "float16 overflow"
OVERFLOW = "overflow"
WRITTEN = "non-finite value written"

Explanation = tuple[str, str]
"""One of the mechanisms above, and a sentence with the operand."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation below autograd, with operands as they were before it."""

    name: str
    """Name in torch's native library without overload and trailing underscore, such as `div`."""
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Tensor
    """The non-finite result."""
    node: str | None
    """The node of the backward pass that ran it; None in the forward pass."""
    function: str
    """The outermost torch function that the user's code called; "" if there is none."""

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def bad(self) -> Tensor:
        """Where the result is not finite."""
        return ~self.result.isfinite()

    def there(self, operand: Any) -> Tensor:
        """The values of an operand where the result is not finite, in one dimension."""
        if not isinstance(operand, Tensor):
            return torch.tensor([operand])
        return operand.detach().broadcast_to(self.result.shape)[self.bad()]

    @property
    def is_derivative(self) -> bool:
        """Whether torch's own derivative of an operation ran it, not a user's backward."""
        return self.node is not None and re.search(r"Backward\d+$", self.node) is not None


POINTS = {"sqrt": "0", "pow": "0", "norm": "0", "acos": "1 or -1", "asin": "1 or -1"}
"""Operands at which derivatives are infinite."""

COMPUTED_WRITES = ("logdet",)
"""Functions in which torch writes an infinity that it computed."""

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


def _first(values: Tensor, holds: Tensor) -> str:
    return f"{values[holds][0].item():.4g}"


def _count(call: Call) -> str:
    number = int(call.bad().sum())
    return f"{number} of {call.result.numel()} elements"


def _half_note(call: Call) -> str:
    if call.result.dtype != torch.float16:
        return ""
    return " in float16, where an epsilon below 6e-8 is 0"


def _zero_divisor(call: Call, top: Any, bottom: Any) -> Explanation | None:
    below, above = call.there(bottom), call.there(top)
    if bool((below == 0).any()):
        both = bool((above[below == 0] == 0).any()) if above.numel() == below.numel() else False
        what = " (0/0)" if both else ""
        return ZERO, f"the divisor is 0{what} for {_count(call)}{_half_note(call)}"
    if bool((below.abs() < 1).all()) and absmax([above]) < _largest(call) ** 0.5:
        return TINY, f"the divisor is {_first(below.abs(), below == below)} for {_count(call)}"
    return None


def _div(call: Call) -> Explanation | None:
    return _zero_divisor(call, call.args[0], call.args[1])


def _addcdiv(call: Call) -> Explanation | None:
    return _zero_divisor(call, call.args[1], call.args[2])


def _reciprocal(call: Call) -> Explanation | None:
    value = call.there(call.args[0])
    if call.name == "rsqrt" and bool((value < 0).any()):
        return DOMAIN, f"the operand of rsqrt is {_first(value, value < 0)}, below 0"
    return _zero_divisor(call, 1.0, call.args[0])


def _log(call: Call) -> Explanation | None:
    place = 1 if call.name in ("xlogy", "special_xlog1py") else 0
    value = call.there(call.args[place]) + (1 if call.name in ("log1p", "special_xlog1py") else 0)
    if bool((value < 0).any()):
        return DOMAIN, f"the operand of {call.name} is {_first(value, value < 0)}, below 0"
    if bool((value == 0).any()):
        return LOG, f"the operand of {call.name} is 0 for {_count(call)}{_half_note(call)}"
    return None


def _logit(call: Call) -> Explanation | None:
    value = call.there(call.args[0])
    if bool(((value == 0) | (value == 1)).any()):
        return LOG, f"the operand of logit is {_first(value, value == value)}"
    return DOMAIN, f"the operand of logit is {_first(value, value == value)}, not within 0 and 1"


def _bounded(low: float, high: float) -> Rule:
    def rule(call: Call) -> Explanation | None:
        value = call.there(call.args[0])
        out = (value < low) | (value > high)
        if bool(out.any()):
            return DOMAIN, f"the operand of {call.name} is {_first(value, out)}"
        edge = (value == low) | (value == high)
        if bool(edge.any()):
            at = _first(value, edge)
            return DOMAIN, f"the operand of {call.name} is {at}, where it is infinite"
        return None

    return rule


def _pow(call: Call) -> Explanation | None:
    base, power = call.there(call.args[0]), call.there(call.args[1]).to(torch.float64)
    if bool(((base == 0) & (power < 0)).any()):
        return ZERO, f"0 is raised to a negative power for {_count(call)}"
    if bool(((base < 0) & (power != power.round())).any()):
        return DOMAIN, f"{_first(base, base < 0)} is raised to a fractional power"
    return None


def _exp(call: Call) -> Explanation | None:
    place = -1 if call.name == "pow" else 0
    value = torch.as_tensor(call.there(call.args[place]), dtype=torch.float64)
    # e^x, 2^x and sinh(x) overflow at operands of the size of the exponent's range.
    limit = 0.4 * math.log2(_largest(call))
    size = value.abs() if call.name in ("sinh", "cosh") else value
    if not bool((size > limit).all()):
        return None
    above = f"; it overflows above {math.log(_largest(call)):.1f}"
    largest = f"the operand of {call.name} is {size.max().item():.4g}"
    return EXP, largest + (above if call.name in ("exp", "expm1") else "")


def _product(call: Call) -> Explanation | None:
    operands = [*call.args, *call.kwargs.values()]
    if not any_nan([call.result]) or not any(_has_infinity(value) for value in operands):
        return None
    return ZERO_INF, f"0 is multiplied by an infinity for {_count(call)}"


def _sum(call: Call) -> Explanation | None:
    operands = [*call.args, *call.kwargs.values()]
    if any_nan([call.result]) and any(_has_infinity(value) for value in operands):
        return INF_INF, f"two infinities cancel, which is undefined, for {_count(call)}"
    return None


def _has_infinity(value: Any) -> bool:
    if isinstance(value, Tensor):
        return can_be_nonfinite(value) and bool(value.detach().isinf().any())
    if isinstance(value, list | tuple):
        return any(_has_infinity(entry) for entry in value)
    return isinstance(value, float) and math.isinf(value)


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
    return DOMAIN, f"the operand of {call.name} is {_first(value, pole)}, where it is infinite"


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
    if epsilons and epsilons[-1] == 0.0 and absmax([call.args[0]]) < _largest(call) ** 0.4:
        return ZERO, "the variance is 0, and so is eps"
    return None


def _determinant(call: Call) -> Explanation | None:
    return LOG, "the determinant is 0"


def _largest(call: Call) -> float:
    kind = call.result.dtype if call.result.is_floating_point() else torch.float32
    return float(torch.finfo(kind).max)


def _overflow(call: Call) -> Explanation | None:
    """Finite operands whose products or sums exceed the largest number of the result's dtype."""
    operands = tensors_in((list(call.args), call.kwargs))
    numbers = [t for t in operands if t.is_floating_point()]
    if not numbers or _has_infinity(operands) or any_nan(numbers):
        return None
    limit, size = _largest(call), max(absmax([t]) for t in numbers)
    longest = max(2, max(t.shape[-1] if t.dim() else 1 for t in numbers))
    if call.name in ("sum", "mean", "cumsum"):
        longest = max(2, numbers[0].numel())
    terms = size if call.name in ("_to_copy", "copy", "add", "sub") else max(size, size**2)
    scalars = [abs(float(v)) for v in call.args if isinstance(v, int | float)]
    if terms * longest * max([1.0, *scalars]) <= limit:
        return None
    what = f"operands up to {size:.4g} give"
    if call.name in ("sum", "mean", "cumsum"):
        what = f"the sum over {numbers[0].numel()} elements up to {size:.4g} gives"
    if call.result.dtype == torch.float16:
        return HALF, f"{what} more than 65504, the largest float16"
    name = str(call.result.dtype).removeprefix("torch.")
    return OVERFLOW, f"{what} more than {limit:.3g}, the largest {name}"


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
    **_named(lambda call: _pow(call) or _exp(call), "pow"),
    **_named(_exp, "exp", "expm1", "exp2", "sinh", "cosh"),
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
    **_named(_determinant, "_linalg_slogdet", "linalg_slogdet", "scalar_tensor"),
    **_named(_pole, "lgamma", "digamma"),
}
"""The rule of each operation; an operation without one is only checked for overflow."""
