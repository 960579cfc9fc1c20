"""What to increase so that an operation comes nearer to its limit, and which weights do so."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from nonfinite.function_names import FunctionNames, plain_name
from nonfinite.headroom import DIVISIONS
from nonfinite.source_lines import of_running_code

Place = tuple[str, int, str]
"""File, line, and the plain name of the torch function."""

Objective = Callable[[Any, Any, Any], Tensor | None]


def _small(place: int) -> Objective:
    """An operand whose absolute value should become small."""

    def rule(args: Any, kwargs: Any, result: Any) -> Tensor | None:
        value = args[place] if len(args) > place else None
        return -value.abs().min() if isinstance(value, Tensor) and value.numel() else None

    return rule


def _low(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    return -args[0].min() if isinstance(args[0], Tensor) and args[0].numel() else None


def _high(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    value = next((arg for arg in reversed(args) if isinstance(arg, Tensor)), None)
    return value.max() if value is not None and value.numel() else None


def _wide(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    return args[0].abs().max() if isinstance(args[0], Tensor) and args[0].numel() else None


def _pow(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    if not isinstance(args[0], Tensor):
        return _high(args, kwargs, result)
    power = args[1] if len(args) > 1 else 1
    if isinstance(power, int | float) and power > 1:
        return _grown(args, kwargs, result)
    return _low(args, kwargs, result)


def _small_result(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    return -result.abs().min() if isinstance(result, Tensor) and result.numel() else None


def _small_norm(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    return -args[0].norm(dim=-1).min() if args[0].dim() else None


def _grown(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    is_number = isinstance(result, Tensor) and result.is_floating_point() and result.numel()
    return result.abs().max() if is_number else None


def _below_mask(args: Any, kwargs: Any, result: Any) -> Tensor | None:
    """A row of scores that a mask of the least number hides should fall below this number."""
    value = _grown(args, kwargs, result)
    if (
        value is None
        or not result.dim()
        or float(value.detach()) < torch.finfo(result.dtype).max / 2
    ):
        return value
    return -result.amax(dim=-1).min()


OBJECTIVES: dict[str, Objective] = {
    **{name: _small(place) for name, place in DIVISIONS.items()},
    **dict.fromkeys(("log", "log2", "log10", "log1p", "rsqrt", "sqrt", "lgamma"), _low),
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _high),
    **dict.fromkeys(("acos", "asin", "arccos", "arcsin", "atanh", "erfinv"), _wide),
    **dict.fromkeys(("pow", "__pow__", "pow_", "__rpow__"), _pow),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm", "std", "var"), _small_result),
    **dict.fromkeys(("cdist", "pairwise_distance"), _small_result),
    **dict.fromkeys(("normalize", "cosine_similarity"), _small_norm),
    **dict.fromkeys(("linear", "matmul", "__matmul__", "bmm", "mm", "sum", "square"), _grown),
    **dict.fromkeys(("mul", "__mul__", "to", "half", "einsum", "baddbmm"), _grown),
    **dict.fromkeys(("add", "__add__", "sub", "__sub__"), _below_mask),
}
"""By the name of the torch function that the code calls."""


class AimFinder:
    """Keeps, for each function that a line of code calls, the call that is nearest to its limit.

    Args:
        line: the file and the line.
    """

    def __init__(self, line: tuple[str, int]) -> None:
        self.line = line
        self.values: dict[Place, Tensor] = {}

    def before_function(self, func: Any, args: Any, kwargs: Any) -> None:
        """Called before each torch function."""

    def after_function(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keeps the value of a call that has an objective."""
        objective = OBJECTIVES.get(getattr(func, "__name__", ""))
        source = None if objective is None else of_running_code(find_aim.__code__)
        if objective is None or source is None or (source.file, source.line) != self.line:
            return
        place = source.file, source.line, plain_name(resolve_name(func) or func.__name__)
        try:
            value = objective(args, kwargs, result)
        # Operands of an unknown kind have no objective.
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return
        if value is None or not value.requires_grad or not bool(value.isfinite()):
            return
        known = self.values.get(place)
        if known is None or bool(value > known):
            self.values[place] = value


def find_aim(run: Callable[[], Any], place: Place) -> Tensor | None:
    """Runs a forward pass; returns the scalar that should increase at a place of the code.

    If the place has none, that of another function on its line is taken.
    """
    finder = AimFinder(place[:2])
    with FunctionNames(finder):
        run()
    value = finder.values.get(place)
    return value if value is not None else next(iter(finder.values.values()), None)


def distances(value: Tensor) -> dict[int, int]:
    """The leaves that a value depends on, by identity, with the number of nodes in between."""
    found: dict[int, int] = {}
    queue = deque([(value.grad_fn, 0)])
    seen = set()
    while queue:
        node, depth = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.setdefault(id(variable), depth)
        queue.extend((inner, depth + 1) for inner, _ in node.next_functions)
    return found


NEAR = 3
"""Weights at most so many nodes behind the nearest one are moved together with it."""


def nearest_leaves(
    value: Tensor, named: dict[str, Tensor], *, near: int = NEAR
) -> dict[str, Tensor]:
    """The named tensors that a value depends on most directly, the nearest first."""
    far = distances(value)
    known = {name: far[id(tensor)] for name, tensor in named.items() if id(tensor) in far}
    if not known:
        return {}
    least = min(known.values())
    within = {name: distance for name, distance in known.items() if distance <= least + near}
    return {name: named[name] for name in sorted(within, key=within.__getitem__)}


def direction(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The signs of the gradient of a value with respect to leaves; without those it ignores."""
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    signs = {}
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is not None:
            sign = gradient.nan_to_num(0.0).sign()
            if bool(sign.any()):
                signs[name] = sign
    return signs


def movable(model: nn.Module, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and buffers that a search may move, by name."""
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    return {**named, **buffers}
