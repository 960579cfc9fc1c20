"""Origins of non-finite values: in which memory they are, and what counts as written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nonfinite.finding import INPUT, Finding
from nonfinite.finite_checks import any_nan
from nonfinite.mechanisms import HALF, OVERFLOW

FRESH = frozenset(
    ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
"""Operations whose result is uninitialised memory, which may hold anything."""

WRITES = frozenset(
    ("fill", "masked_fill", "full", "full_like", "new_full", "scalar_tensor", "where")
) | frozenset(
    ("index_put", "_index_put_impl", "index_fill", "masked_scatter", "scatter", "lift_fresh")
)
"""Operations that compute nothing: a non-finite value in their result was written on purpose."""

MOVES = (
    frozenset(("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice"))
    | frozenset(("select", "squeeze", "unsqueeze", "as_strided", "unfold", "flip", "roll"))
    | frozenset(("index", "index_select", "gather", "repeat", "cat", "stack"))
    | frozenset(("sum", "mean", "amax", "amin", "cumsum"))
)
"""Operations that put the values of an operand elsewhere, or add some of them up."""

COPIES = frozenset(("clone", "copy", "_to_copy", "alias", "detach"))
"""Operations whose result has the values of an operand in the same places."""

MADE, MEANT, READ = "made", "meant", "read"
"""Origins: an operation on finite values; a value that was written; a value from outside."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Where non-finite values in a piece of memory come from."""

    kind: str
    order: int
    finding: Finding


def first_of(origins: Sequence[Origin]) -> Origin:
    """The origin to be named: the first, but a value that was written only if there is no other."""
    return min(origins, key=lambda origin: (origin.kind == MEANT, origin.order))


def whence(origins: Sequence[Origin]) -> str:
    """A clause that says where infinities come from, if that is known."""
    finding = first_of(origins).finding
    if finding.source is None:
        return ""
    if finding.operation.startswith(INPUT):
        return f"; the infinity is older than this step, which reads it at {finding.source.place}"
    return f"; the infinity was written at {finding.source.place}"


Placed = tuple[Origin, Tensor | None]
"""An origin, and the elements of a tensor that come from it; None: unknown."""

Layout = tuple[Any, ...]


@dataclass(kw_only=True)
class _Memory:
    """The origins of the values in a piece of memory, in the order of `put`."""

    origins: list[Origin] = field(default_factory=list)
    elements: dict[tuple[Origin, Layout], Tensor] = field(default_factory=dict)
    """Which elements of a tensor come from an origin, by origin and layout."""


class Origins:
    """Where the non-finite values in each piece of memory come from.

    Harmless values, such as 0/0 in rows that are masked later, may be in one tensor with harmful
    ones, so that the elements that come from each origin are kept, as far as they can be followed.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Memory] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def of(self, tensors: Sequence[Tensor]) -> list[Origin]:
        """The origins of the values in the memory of some tensors."""
        places = [memory_of(tensor) for tensor in tensors]
        return [
            origin
            for place in dict.fromkeys(places)
            if place in self._known
            for origin in self._known[place].origins
        ]

    def forget(self, tensor: Tensor) -> None:
        """Called when the memory of a tensor holds other values."""
        self._known.pop(memory_of(tensor), None)

    def put(self, tensor: Tensor, placed: Sequence[Placed], *, is_view: bool = False) -> None:
        """Sets the origins of a tensor's memory; a view adds to what is known of it."""
        memory = memory_of(tensor)
        if not is_view or memory not in self._known:
            self._known[memory] = _Memory()
        known = self._known[memory]
        for origin, elements in placed:
            if origin not in known.origins:
                known.origins.append(origin)
            if elements is not None:
                known.elements[origin, _layout(tensor)] = elements

    def inherited(
        self, func: Any, args: Any, kwargs: Any, read: Sequence[Tensor], result: Tensor
    ) -> list[Placed]:
        """The origins of operands whose values are in the result.

        Args:
            func: the operation.
            args, kwargs: its arguments.
            read: the operands that are not finite.
            result: its result.
        """
        bad = ~result.isfinite()
        found: dict[Origin, Tensor | None] = {}
        for operand in read:
            known = self._known.get(memory_of(operand), _Memory())
            for origin in known.origins:
                elements = known.elements.get((origin, _layout(operand)), ~operand.isfinite())
                reached = _reached(func, args, kwargs, operand, elements, bad)
                if reached is not None and not bool(reached.any()):
                    continue
                before = found.get(origin, torch.zeros_like(bad))
                is_known = before is not None and reached is not None
                found[origin] = before | reached if is_known else None  # type: ignore[operator]
        return list(found.items()) or [(origin, None) for origin in self.of(read)]


def _reached(
    func: Any, args: Any, kwargs: Any, operand: Tensor, elements: Tensor, bad: Tensor
) -> Tensor | None:
    """The non-finite elements of a result that come from some of an operand; None: unknown."""
    if not is_pointwise(func) and name_of(func) not in MOVES:
        return None

    def marked(leaf: Any) -> Any:
        if leaf is operand:
            return elements.to(leaf.dtype)
        is_other = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.zeros_like(leaf) if is_other else leaf

    try:
        if is_pointwise(func):
            return elements.broadcast_to(bad.shape) & bad
        moved = func(*torch.utils._pytree.tree_map(marked, args), **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None
    return (moved != 0) & bad if isinstance(moved, Tensor) and moved.shape == bad.shape else None


def is_pointwise(func: Any) -> bool:
    """Whether each element of the result depends on the same element of each operand alone."""
    return torch.Tag.pointwise in getattr(func, "tags", ()) or name_of(func) in COPIES


def name_of(func: Any) -> str:
    """Name in torch's native library without overload and trailing underscore, such as `div`."""
    schema = getattr(func, "_schema", None)
    return str(getattr(schema, "name", str(func)).rpartition("::")[2].rstrip("_"))


def fresh_values(func: Any, bad_operands: Sequence[Tensor], result: Tensor) -> Tensor | None:
    """The result with 0 where an operand was not finite; None if nothing else is non-finite."""
    if not is_pointwise(func) or result.dim() == 0:
        return None
    old = torch.zeros_like(result, dtype=torch.bool)
    for operand in bad_operands:
        try:
            old = old | ~operand.isfinite().broadcast_to(result.shape)
        except RuntimeError:
            return None
    rest = result.detach().masked_fill(old, 0)
    return None if bool(rest.isfinite().all()) else rest


class LostOverflows:
    """Overflows that a later operation made finite again, as 1 / inf = 0 does.

    They do no harm by themselves, but a zero that comes of one may be divided by later.
    """

    def __init__(self) -> None:
        self._known: dict[int, Finding] = {}

    def follow(self, operands: list[Tensor], memory: int, origins: Origins) -> None:
        """Keeps for the memory of a result the first overflow that it was computed from."""
        if not origins and not self._known:
            return
        places = [memory_of(operand) for operand in operands]
        made = [origin.finding for origin in origins.of(operands)]
        found = [finding for finding in made if finding.mechanism in (HALF, OVERFLOW)]
        found += [self._known[place] for place in places if place in self._known]
        self._known.pop(memory, None)
        if found:
            self._known[memory] = found[-1]

    def before(self, operands: list[Tensor]) -> str:
        """A clause that names the overflow behind the operands; empty if there is none."""
        places = [memory_of(operand) for operand in operands]
        found = next((self._known[place] for place in places if place in self._known), None)
        if found is None:
            return ""
        where = "" if found.source is None else f" at {found.source.place}"
        return (
            f"; before that, {found.operation} in {found.module or 'the top-level module'}"
            f" overflowed{where}, and a later operation made the Inf finite again"
        )


def kept_operands(schema: Any, args: Any) -> list[Any]:
    """The operands, with copies of those that the operation is about to change."""
    kept = list(args)
    for place, argument in enumerate(getattr(schema, "arguments", ())[: len(kept)]):
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if changes and isinstance(kept[place], Tensor) and not kept[place].is_meta:
            kept[place] = _copy_of(kept[place])
    return kept


def writes_to_operand(func: Any) -> bool:
    """Whether an operation changes one of its operands."""
    schema = getattr(func, "_schema", None)
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in getattr(schema, "arguments", ())
    )


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy that remembers whose memory it copies."""
    copy = tensor.detach().clone()
    copy._copied = memory_of(tensor), _layout(tensor)  # type: ignore[attr-defined]
    return copy


def _layout(tensor: Tensor) -> Layout:
    """Tells views of one piece of memory apart."""
    copied: tuple[int, Layout] | None = getattr(tensor, "_copied", None)
    if copied is not None:
        return copied[1]
    if tensor.layout != torch.strided:
        return ()
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def memory_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share."""
    copied: tuple[int, Layout] | None = getattr(tensor, "_copied", None)
    if copied is not None:
        return copied[0]
    if tensor.layout != torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0


def nonfinite_numbers(tree: Any) -> list[float]:
    """The NaN and infinite numbers among the plain arguments of an operation."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    numbers = [leaf for leaf in leaves if isinstance(leaf, float)]
    return [number for number in numbers if number != number or abs(number) == float("inf")]


def is_written(
    name: str, arguments: Any, operands: list[Tensor], result: Tensor, *, is_computed: bool
) -> bool:
    """Whether the code wrote a non-finite value, such as a mask's, rather than computed it.

    Args:
        name: the operation.
        arguments: its arguments.
        operands: the tensors among them.
        result: a result that is not finite.
        is_computed: whether a function runs that writes infinities which it has computed.
    """
    # The logarithm of a mask of zeros and ones is an additive mask.
    if name.startswith("log") and operands and _is_binary(operands[0]):
        return True
    numbers, is_nan = nonfinite_numbers(arguments), any_nan([result])
    if is_nan and numbers and not any_nan([torch.tensor(numbers)]):
        return False
    return not is_computed and (name in WRITES or (bool(numbers) and not is_nan))


def _is_binary(tensor: Tensor) -> bool:
    if tensor.requires_grad:
        return False
    zero, one = tensor == 0, tensor == 1
    return bool((zero | one).all()) and bool(zero.any()) and bool(one.any())
