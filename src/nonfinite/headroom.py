"""How near a step that is finite comes to the limits of its arithmetic, operation by operation."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from nonfinite.activations import corner_scores, is_attention
from nonfinite.tracer import Finding, Tracer, tensors_in, trace

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
"""Functions that are infinite at 0, and which of their arguments must not be 0."""


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How far one quantity is from where it would stop being finite."""

    module: str
    """Path of the module whose code ran, or that owns the parameter."""
    quantity: str
    value: float
    """The one nearest to its limit."""
    limit: float
    doublings: float
    """Factors of two between the two."""

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class MarginTracer(Tracer):
    """Keeps, of every module and operation, the result and the divisor that are the nearest."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.margins: dict[tuple[str, str], Margin] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function as the tracer does, and measures what is finite."""
        name = getattr(func, "__name__", str(func))
        if is_attention(func):
            scores = corner_scores(*args, **(kwargs or {}))
            if scores is not None:
                self.keep_large("attention logits", self.module, scores)
        place = DIVISIONS.get(name)
        if place is not None and place < len(args) and isinstance(args[place], Tensor):
            self._keep_small(name, args[place])
        result = super().__torch_function__(func, types, args, kwargs)
        left = _doublings_left(tensors_in((args, kwargs)))
        for tensor in tensors_in(result):
            # What only moves numbers about brings none of them nearer to a limit.
            if _doublings_left([tensor]) < left:
                self.keep_large(f"result of {resolve_name(func) or name}", self.module, tensor)
        return result

    def keep(self, margin: Margin) -> None:
        """Keeps it where it is the nearest of its module and quantity."""
        known = self.margins.get((margin.module, margin.quantity))
        if known is None or margin.doublings < known.doublings:
            self.margins[margin.module, margin.quantity] = margin

    def keep_large(self, quantity: str, module: str, tensor: Tensor) -> None:
        """Keeps the largest finite entry of a tensor against the largest number of its type."""
        largest = largest_of(tensor)
        if largest > 0:
            limit = torch.finfo(tensor.dtype).max
            self.keep(_margin(module, quantity, largest, limit, math.log2(limit / largest)))

    def _keep_small(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        smallest = tensor.detach().abs().min().item()
        if smallest > 0:
            limit = torch.finfo(tensor.dtype).smallest_normal
            what = "smallest argument" if name in ("log", "rsqrt") else "smallest divisor"
            bits = math.log2(smallest / limit)
            self.keep(_margin(self.module, f"{what} of {name}", smallest, limit, bits))

    def keep_parameters(self) -> None:
        """Weights, and the squares that gradient norms are made of."""
        for name, parameter in self.root.named_parameters():
            module, _, field = name.rpartition(".")
            self.keep_large(field, module, parameter)
            if parameter.grad is not None:
                square = parameter.grad.detach().double().square().sum().item()
                limit = torch.finfo(torch.float32).max
                if 0 < square < math.inf:
                    quantity, bits = f"squared gradient norm of {field}", math.log2(limit / square)
                    self.keep(_margin(module, quantity, square, limit, bits))


def largest_of(tensor: Tensor) -> float:
    """The largest absolute value that is finite: a mask's infinities are there on purpose."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    sizes = tensor.detach().abs()
    return torch.where(sizes.isfinite(), sizes, 0.0).max().item()


def _doublings_left(tensors: Iterable[Tensor]) -> float:
    """Until the first of them is at the largest number of its type."""
    known = [(torch.finfo(t.dtype).max, largest_of(t)) for t in tensors if t.is_floating_point()]
    return min((math.log2(limit / value) for limit, value in known if value > 0), default=math.inf)


def _margin(module: str, quantity: str, value: float, limit: float, doublings: float) -> Margin:
    return Margin(module=module, quantity=quantity, value=value, limit=limit, doublings=doublings)


def margins_of(
    root: nn.Module,
    loss_of: Callable[[], Tensor | None],
    second_moments: Iterable[Tensor] = (),
    *,
    batch: Any = None,
) -> tuple[Finding | None, list[Margin]]:
    """Runs forward and backward once; names what was not finite, or what came nearest to it.

    Args:
        root: the module that owns the weights; its gradients are left as the pass makes them.
        loss_of: runs the forward pass and returns the loss; None where there is none.
        second_moments: of the optimizer, where they are known.
        batch: as `trace` takes it.

    Returns:
        The finding, or None and the margins, the narrowest first.
    """
    tracer = MarginTracer(root)
    finding = trace(root, loss_of, tracer, batch=batch)
    tracer.keep_parameters()
    for moment in second_moments:
        tracer.keep_large("AdamW's second moment", "optimizer", moment)
    return finding, sorted(tracer.margins.values(), key=lambda margin: margin.doublings)
