"""Origins of non-finite values: of which memory they are kept, and what counts as written."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonfinite.finding import Finding
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

MADE, MEANT, READ = "made", "meant", "read"
"""Origins: an operation on finite values; a value that was written; a value from outside."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the non-finite values in a piece of memory come from."""

    kind: str
    order: int
    finding: Finding


class LostOverflows:
    """Overflows that a later operation made finite again, as 1 / inf = 0 does.

    They do no harm by themselves, but a zero that comes of one may be divided by later.
    """

    def __init__(self) -> None:
        self._known: dict[int, Finding] = {}

    def follow(self, operands: list[Tensor], memory: int, origins: dict[int, Origin]) -> None:
        """Keeps for the memory of a result the first overflow that it was computed from."""
        if not origins and not self._known:
            return
        places = [memory_of(operand) for operand in operands]
        made = [origins[place].finding for place in places if place in origins]
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


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy that remembers whose memory it copies."""
    copy = tensor.detach().clone()
    copy._copied_memory = memory_of(tensor)  # type: ignore[attr-defined]
    return copy


def memory_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share."""
    copied: int | None = getattr(tensor, "_copied_memory", None)
    if copied is not None:
        return copied
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


def is_binary(tensor: Tensor) -> bool:
    if tensor.requires_grad:
        return False
    zero, one = tensor == 0, tensor == 1
    return bool((zero | one).all()) and bool(zero.any()) and bool(one.any())
