"""What a search runs a model with: changed inputs or weights, and how much they were changed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from nonfinite.auditing.audit_report import AS_IS, INPUT, WEIGHTS
from nonfinite.auditing.audited_passes import Values


@dataclass(frozen=True, kw_only=True)
class Base:
    """Inputs on which weights are moved."""

    inputs: Any
    note: str = ""
    """What was changed about them, with a comma; "" if nothing was."""
    doublings: float = 0.0
    """Factors of two by which the largest input had to grow."""


@dataclass(kw_only=True)
class Try:
    """Weights and inputs to run a model with."""

    changes: str
    how: str
    inputs: Any
    values: Values = field(default_factory=dict)
    doublings: float = 0.0
    """Factors of two by which the largest changed weight had to grow."""
    input_doublings: float = 0.0
    """The same of inputs on which weights were moved."""


def moved(start: Values, end: Values, share: float, base: Base) -> Try:
    """Weights on the way from `start` to `end`.

    Args:
        start: the weights given.
        end: those reached.
        share: how much of the way; from 0 to 1.
        base: the inputs.
    """
    here = {n: start[n] + share * (end[n] - start[n]) for n in end}
    growth, parts = 0.0, []
    for name in sorted(here):
        before, after = (float(t[name].abs().max()) for t in (start, here))
        if torch.equal(here[name], start[name]):
            continue
        doublings = math.log2(after / before) if before > 0 and after > 0 else math.inf
        growth = max(growth, doublings)
        parts.append(f"{name} moved (largest entry {before:.3g} -> {after:.3g})")
    how = listed(parts) if parts else "nothing is changed"
    return Try(
        changes=WEIGHTS,
        how=base.note + how,
        inputs=base.inputs,
        values=here,
        doublings=growth,
        input_doublings=base.doublings,
    )


def listed(names: Iterable[str]) -> str:
    """The first two names, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - 2} more" if len(known) > 2 else ""
    return ", ".join(known[:2]) + more


def is_simpler(tried: Try, known: Try) -> bool:
    """Whether a try changes less than the one that is known."""
    order = (AS_IS, INPUT, WEIGHTS)
    new, old = order.index(tried.changes), order.index(known.changes)
    return new < old or (new == old and tried.doublings < known.doublings)
