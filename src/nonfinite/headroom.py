"""Headroom: how close each operation of a finite step comes to the limits of its arithmetic."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from nonfinite.attention_scores import corner_scores, is_attention
from nonfinite.finding import Finding
from nonfinite.finite_checks import tensors_in
from nonfinite.tracer import Tracer, trace

DIVISIONS = {
    "div": 1,
    "div_": 1,
    "true_divide": 1,
    "divide": 1,
    "__truediv__": 1,
    "__itruediv__": 1,
    "__rtruediv__": 0,
    "__rdiv__": 0,
    "reciprocal": 0,
    "rsqrt": 0,
    "log": 0,
}
"""Functions that are infinite at 0, and the index of the argument that must not be 0."""


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Distance of one quantity from the limit at which it would stop being finite."""

    module: str
    """Path of the module that ran the operation or owns the parameter."""
    quantity: str
    value: float
    """The value nearest to the limit."""
    limit: float
    doublings: float
    """Factors of two between value and limit."""


class HeadroomTracer(Tracer):
    """Keeps the smallest headroom of every module and quantity."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.nearest: dict[tuple[str, str], Headroom] = {}

    def before_function(self, func: Any, args: Any, kwargs: Any) -> None:
        """Measures divisors and attention scores."""
        if is_attention(func):
            scores = corner_scores(*args, **kwargs)
            if scores is not None:
                self.keep_large("attention logits", self.module, scores)
        name = getattr(func, "__name__", str(func))
        place = DIVISIONS.get(name)
        if place is not None and place < len(args) and isinstance(args[place], Tensor):
            self._keep_small(name, args[place])

    def after_function(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Measures results against the largest number of their dtype."""
        name = getattr(func, "__name__", str(func))
        left = _doublings_left(tensors_in((args, kwargs)))
        for tensor in tensors_in(result):
            # A function that only moves or copies numbers brings none of them closer to a limit.
            if _doublings_left([tensor]) < left:
                self.keep_large(f"result of {resolve_name(func) or name}", self.module, tensor)

    def keep(self, headroom: Headroom) -> None:
        """Keeps a headroom if it is the smallest of its module and quantity."""
        known = self.nearest.get((headroom.module, headroom.quantity))
        if known is None or headroom.doublings < known.doublings:
            self.nearest[headroom.module, headroom.quantity] = headroom

    def keep_large(self, quantity: str, module: str, tensor: Tensor) -> None:
        """Measures the largest finite entry of a tensor against the largest number of its dtype."""
        largest = largest_of(tensor)
        if largest > 0:
            limit = torch.finfo(tensor.dtype).max
            self.keep(_headroom(module, quantity, largest, limit, math.log2(limit / largest)))

    def _keep_small(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        smallest = tensor.detach().abs().min().item()
        if smallest > 0:
            limit = torch.finfo(tensor.dtype).smallest_normal
            what = "smallest argument" if name in ("log", "rsqrt") else "smallest divisor"
            bits = math.log2(smallest / limit)
            self.keep(_headroom(self.module, f"{what} of {name}", smallest, limit, bits))

    def keep_parameters(self) -> None:
        """Measures weights, and the sums of squares from which gradient norms are computed."""
        for name, parameter in self.root.named_parameters():
            module, _, field = name.rpartition(".")
            self.keep_large(field, module, parameter)
            if parameter.grad is not None:
                square = parameter.grad.detach().double().square().sum().item()
                limit = torch.finfo(torch.float32).max
                if 0 < square < math.inf:
                    quantity, bits = f"squared gradient norm of {field}", math.log2(limit / square)
                    self.keep(_headroom(module, quantity, square, limit, bits))


def largest_of(tensor: Tensor) -> float:
    """The largest finite absolute value; a mask's infinities are ignored."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    sizes = tensor.detach().abs()
    return torch.where(sizes.isfinite(), sizes, 0.0).max().item()


def _doublings_left(tensors: Iterable[Tensor]) -> float:
    """Factors of two until one of the tensors reaches the largest number of its dtype."""
    known = [(torch.finfo(t.dtype).max, largest_of(t)) for t in tensors if t.is_floating_point()]
    return min((math.log2(limit / value) for limit, value in known if value > 0), default=math.inf)


def _headroom(module: str, quantity: str, value: float, limit: float, doublings: float) -> Headroom:
    return Headroom(module=module, quantity=quantity, value=value, limit=limit, doublings=doublings)


def headroom_of(
    root: nn.Module,
    loss_of: Callable[[], Tensor | None],
    second_moments: Iterable[Tensor] = (),
    *,
    batch: Any = None,
) -> tuple[Finding | None, list[Headroom]]:
    """Runs forward and backward once; returns the finding or the headroom.

    Args:
        root: the module that owns the weights; it keeps the gradients of the pass.
        loss_of: runs the forward pass and returns the loss, or None if there is no loss.
        second_moments: AdamW's second moments, if known.
        batch: as for `trace`.

    Returns:
        The finding, or None; and the headroom of each quantity, smallest first.
    """
    tracer = HeadroomTracer(root)
    finding = trace(root, loss_of, tracer, batch=batch)
    tracer.keep_parameters()
    for moment in second_moments:
        tracer.keep_large("AdamW's second moment", "optimizer", moment)
    return finding, sorted(tracer.nearest.values(), key=lambda headroom: headroom.doublings)
