"""One pass under watch: every operation that has a limit, its values, and what is proved of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.auditing.elementwise_rules import ELEMENTWISE
from nonfinite.auditing.movement_rules import MOVEMENTS
from nonfinite.auditing.operation_limits import Check, checks_of, overflow
from nonfinite.auditing.reduction_rules import REDUCTIONS
from nonfinite.auditing.value_ranges import (
    ANY,
    INF,
    Known,
    Rule,
    Step,
    exactly,
    hull,
    largest,
    rounded,
)
from nonfinite.finding import Finding
from nonfinite.finite_checks import tensors_in
from nonfinite.function_names import inside_of, plain_name, running_derivative
from nonfinite.origins import FRESH, memory_of, name_of, nonfinite_numbers, num_bytes
from nonfinite.source_lines import Source
from nonfinite.tracer import Tracer

TRANSFERS: dict[str, Rule] = {**ELEMENTWISE, **REDUCTIONS, **MOVEMENTS}
"""The rule of each operation, by its name in torch's native library. A rule may only say what holds
for every value of its operands within their bounds; without a rule a result is unknown."""

IN_ALL_RESULTS = ("split", "split_with_sizes", "unbind", "chunk")
"""Operations all of whose results follow the rule; of others the first alone does."""


def transfer(step: Step, place: int = 0) -> Known | None:
    """What is known of a result of an operation; None if nothing is.

    Args:
        step: the operation.
        place: which of its results.
    """
    rule = TRANSFERS.get(step.name)
    if rule is None or (place and step.name not in IN_ALL_RESULTS):
        return None
    try:
        return rule(step)
    # A rule that meets operands of an unknown kind knows nothing.
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return None


LARGE_INTEGER = 2.0**63
"""Integers are finite."""

SiteKey = tuple[str, str, int, str, str]
"""Phase, file, line, operation and what is inside it: one operation of the code, in all layers."""


@dataclass(kw_only=True)
class Seen:
    """What one pass in one dtype shows of an operation, over all layers and calls."""

    key: SiteKey
    limit: str
    source: Source | None
    modules: list[str] = field(default_factory=list)
    doublings: float = math.inf
    """Of the call nearest to the limit."""
    reasons: list[str | None] = field(default_factory=list)
    """Of each call."""

    @property
    def reason(self) -> str | None:
        """Why no call can reach the limit; None if that is not proved of all."""
        return None if None in self.reasons or not self.reasons else self.reasons[0]


class Collector(Tracer):
    """Follows bounds of values through a pass, and keeps the operations that have a limit.

    Args:
        root: the module that owns the weights.
        ranges: bounds of weights, buffers and inputs, by the memory that holds them.
        rows: rows of the batch.
    """

    def __init__(self, root: nn.Module, ranges: Mapping[int, Known], *, rows: int = 1) -> None:
        super().__init__(root)
        self.rows = rows
        self.seen: dict[tuple[SiteKey, str], Seen] = {}
        self.has_read_values = False
        """Whether the code has turned values into Python numbers: constants may then be none."""
        self._ranges = dict(ranges)
        self._known: dict[int, dict[tuple[Any, ...], Known]] = {}
        self._num_tokens = 0

    def _look(
        self, func: Any, args: Any, kwargs: Any, originals: list[Tensor], result: Any
    ) -> None:
        """Follows one operation; it never becomes a finding."""
        name = name_of(func)
        if name in ("_local_scalar_dense", "item") and originals[0].dtype != torch.bool:
            self.has_read_values = True
        kept = dict(zip(map(id, tensors_in(args)), originals, strict=False))
        known: dict[int, Known] = {}

        results = tensors_in(result)
        dtype = results[0].dtype if results else torch.float32

        def known_of(value: Any) -> Known:
            if isinstance(value, float) and not self.has_read_values:
                # A number in the code is rounded to float32 or to the dtype of the operation.
                return hull(*(exactly(rounded(value, kind)) for kind in (torch.float32, dtype)))
            original = kept.get(id(value), value)
            if id(original) not in known:
                known[id(original)] = self._known_of(original)
            return known[id(original)]

        operands = [known_of(tensor) for tensor in tensors_in((args, kwargs))]
        shared = {memory_of(tensor) for tensor in originals}
        for place, tensor in enumerate(results):
            self._kept.append(tensor)
            step = Step(
                name=name,
                args=args,
                kwargs=kwargs,
                result=tensor,
                known=known_of,
                rows=self.rows,
            )
            bounds, raw = self._bounds(step, place, operands)
            if tensor.is_floating_point():
                self._keep_checks(step, place, raw)
            self._set(name, tensor, bounds, shared, originals)

    def _bounds(self, step: Step, place: int, operands: list[Known]) -> tuple[Known, float]:
        """What is known of a result, and the largest size that it could have before rounding."""
        found = transfer(step, place)
        dtype = step.result.dtype
        if dtype == torch.bool:
            found = found or Known(low=0.0, high=1.0)
        known, raw = found or ANY, (found or ANY).size
        if math.isnan(known.low) or math.isnan(known.high):
            known, raw = ANY, INF
        low, high = rounded(known.low, dtype), rounded(known.high, dtype)
        if not step.result.is_floating_point():
            low, high = max(low, -LARGE_INTEGER), min(high, LARGE_INTEGER)
        else:
            # Overflow is a matter of its own operation; those after it get finite operands, unless
            # an infinity was there before, as that of a mask.
            written = nonfinite_numbers((step.args, step.kwargs))
            top = INF if written or any(map(_is_infinite, operands)) else largest(dtype)
            low, high = max(low, -top), min(high, top)
        sized = known.has_data_size or (
            any(o.has_data_size for o in operands) and step.result.dim() > 0
        )
        self._num_tokens += 1
        token = known.token or self._num_tokens
        return replace(known, low=low, high=high, token=token, has_data_size=sized), raw

    def _known_of(self, value: Any) -> Known:
        """What is known of an operand: a tensor or a number."""
        if isinstance(value, bool | int | float):
            return ANY if self.has_read_values else exactly(float(value))
        if not isinstance(value, Tensor):
            return ANY
        memory = memory_of(value)
        found = self._known.get(memory, {}).get(_geometry(value))
        if found is not None:
            return found
        known = self._ranges[memory] if memory in self._ranges else self._constant(value)
        if known.low > known.high:
            # Memory that an operation has written in a way that is not followed.
            known = Known(low=-largest(torch.float32), high=largest(torch.float32))
        self._num_tokens += 1
        # Until something is written into its memory, the tensor holds the same values.
        named = replace(known, token=self._num_tokens)
        self._known.setdefault(memory, {})[_geometry(value)] = named
        return named

    def _constant(self, value: Tensor) -> Known:
        """The bounds of a tensor that no operation of the pass made, such as a table."""
        if value.is_complex() or self.has_read_values:
            return Known(low=-largest(torch.float32), high=largest(torch.float32))
        if not value.numel() or value.layout != torch.strided:
            return ANY
        least, most = value.detach().min(), value.detach().max()
        known = Known(low=float(least), high=float(most))
        if known.low == known.high:
            known = exactly(known.low)
        self._kept.append(value)
        self._ranges[memory_of(value)] = known
        return known

    def _set(
        self, name: str, tensor: Tensor, known: Known, shared: set[int], originals: list[Tensor]
    ) -> None:
        """Keeps what is known of a result, of its memory, and of views of the same memory."""
        memory = memory_of(tensor)
        if name in FRESH:
            # Whatever it holds is written before it is read.
            self._ranges[memory] = Known(low=INF, high=-INF)
            self._known.pop(memory, None)
            return
        is_write = any(tensor is original for original in originals)
        if memory in shared and not is_write:
            # A view, or an operation that returned its operand.
            self._known.setdefault(memory, {})[_geometry(tensor)] = known
            return
        covers = tensor.numel() * tensor.element_size() >= num_bytes(tensor)
        if is_write and not covers:
            before = self._ranges.get(memory, ANY)
            self._ranges[memory] = hull(before, known)
        else:
            self._ranges[memory] = known.plain()
        self._known[memory] = {_geometry(tensor): known}

    def _keep_checks(self, step: Step, place: int, raw: float) -> None:
        """Keeps the limits of an operation."""
        node = running_derivative()
        checks: list[Check] = []
        try:
            checks = checks_of(step, node) if place == 0 else []
            grown = overflow(step, raw) if node is None else None
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return
        if grown is not None:
            checks.append(grown)
        if not checks:
            return
        source, operation = self._source(), self._operation(step.name)
        if source is None and not self.module and node is None:
            # What the audit itself computes from the outputs, to differentiate it.
            return
        key = key_of(self._phase(), source, operation, inside_of(operation, step.name))
        module = self._module_of_operation()
        for check in checks:
            seen = self.seen.setdefault(
                (key, check.limit), Seen(key=key, limit=check.limit, source=source)
            )
            if module not in seen.modules:
                seen.modules.append(module)
            seen.doublings = min(seen.doublings, check.doublings)
            seen.reasons.append(check.reason)


def _is_infinite(known: Known) -> bool:
    """Whether infinities are among the possible values."""
    return known.low == -INF or known.high == INF


def key_of(phase: str, source: Source | None, operation: str, inside: str | None) -> SiteKey:
    """The key of an operation, for a site and for a finding alike."""
    plain = plain_name(operation)
    file, line = ("", 0) if source is None else (source.file, source.line)
    return phase, file, line, plain, inside or plain


def key_of_finding(finding: Finding) -> SiteKey:
    """The key of the operation that a trace found."""
    return key_of(finding.phase, finding.source, finding.operation, finding.inside)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
