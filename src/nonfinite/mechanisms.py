"""The ways in which an operation makes a non-finite value, and the operation with its operands."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonfinite.finite_checks import can_be_nonfinite

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
GIVEN = "value from outside"

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


def shown(values: Tensor, holds: Tensor) -> str:
    return f"{values[holds][0].item():.4g}"


def share(call: Call) -> str:
    number = int(call.bad().sum())
    return f"{number} of {call.result.numel()} elements"


def half_note(call: Call) -> str:
    if call.result.dtype != torch.float16:
        return ""
    return " in float16, where an epsilon below 6e-8 is 0"


def largest_number(call: Call) -> float:
    kind = call.result.dtype if call.result.is_floating_point() else torch.float32
    return float(torch.finfo(kind).max)


def has_infinity(value: Any) -> bool:
    if isinstance(value, Tensor):
        return can_be_nonfinite(value) and bool(value.detach().isinf().any())
    if isinstance(value, list | tuple):
        return any(has_infinity(entry) for entry in value)
    return isinstance(value, float) and math.isinf(value)
