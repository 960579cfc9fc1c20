"""The search for witnesses: inputs or weights with which an operation really fails."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nonfinite import mechanisms
from nonfinite.auditing.audit_collector import SiteKey, key_of_finding
from nonfinite.auditing.audit_report import AS_IS, INPUT, WEIGHTS, Site, Witness
from nonfinite.auditing.audited_passes import Passes, Values
from nonfinite.auditing.objectives import (
    NEAR,
    Place,
    direction,
    find_aim,
    movable,
    nearest_leaves,
)
from nonfinite.auditing.reach import (
    Reach,
    changed_inputs,
    enlarged,
    hidden_inputs,
    leaves_of,
    movable_buffers,
    with_leaf,
)
from nonfinite.auditing.tried_changes import Base, Try, is_simpler, listed, moved
from nonfinite.finding import Finding

STEPS = 15
"""Steps of a drive along gradients."""

DOUBLINGS = 10
"""The first step is so many doublings shorter than the range; each next one is twice as long, up
to the whole range."""

HALVINGS = 5
"""Halvings by which the smallest change that still fails is found."""

OVERFLOW_DOUBLINGS = 14
"""An overflow is driven only if it is nearer than this in the pass as given."""

MAX_OVERFLOWS = 4
"""The nearest overflows alone are driven: in float16 almost every product can overflow."""

ALL_NEAR = 1000
"""A distance in the graph, in nodes, that is meant to reach all weights of a model."""

MAX_SINGLE = 4
"""So many of the nearest weights are set to 0 one by one, before all are together."""

MAX_ZEROED = 12
"""More weights than this are not set to 0 together."""


@dataclass(kw_only=True)
class Search:
    """The search in all dtypes.

    Args:
        passes: a copy of the model in each dtype, by its name.
        inputs: the user's inputs.
        reach: the range.
        sites: what the passes as given have shown.
        until: when to stop, as `time.monotonic`.
    """

    passes: dict[str, Passes]
    inputs: Any
    reach: Reach
    sites: dict[tuple[SiteKey, str], Site]
    until: float
    pass_seconds: float = 0.0
    """The longest time of a traced pass so far; none is begun that would overrun `until`."""
    witnesses: dict[tuple[SiteKey, str], tuple[Try, Witness]] = field(default_factory=dict)
    """What was tried and what it gave, by operation and dtype."""
    ran_out: bool = False
    fails_as_given: list[str] = field(default_factory=list)
    """The dtypes in which the model fails without a change; nothing else is tried if it does in
    all."""

    def run(self) -> None:
        """Tries the model as given, other inputs, and then other weights."""
        failing = self.attempt(Try(changes=AS_IS, how="nothing is changed", inputs=self.inputs))
        self.fails_as_given = list(failing)
        if len(failing) == len(self.passes):
            return
        for what, inputs in changed_inputs(self.inputs, self.reach):
            if self.is_late():
                return
            self.attempt(Try(changes=INPUT, how=what, inputs=inputs))
        # A model that fails as given in one dtype says nothing about other weights in it.
        for dtype in failing:
            self.passes = {d: p for d, p in self.passes.items() if d != dtype}
        for place in self.places():
            if self.is_late():
                return
            self.drive(place)

    def is_late(self) -> bool:
        """Whether the time is up, or would be after one more pass."""
        self.ran_out = self.ran_out or time.monotonic() + self.pass_seconds > self.until
        return self.ran_out

    def attempt(self, tried: Try, dtypes: Iterable[str] | None = None) -> dict[str, Finding]:
        """Runs in each dtype; keeps a witness for what fails, and returns the findings."""
        found = {}
        for dtype in list(self.passes) if dtypes is None else dtypes:
            passes = self.passes[dtype]
            if self.is_late() or not passes.fails(tried.values, tried.inputs):
                continue
            finding = self.traced(passes, tried)
            if finding is not None:
                found[dtype] = finding
                self.keep(finding, dtype, tried)
        return found

    def traced(self, passes: Passes, tried: Try) -> Finding | None:
        """The finding of a try; None if the model refuses it under the tracer."""
        start = time.monotonic()
        try:
            return passes.traced(tried.values, tried.inputs)
        except Exception:  # a user's model may fail in any way
            return None
        finally:
            self.pass_seconds = max(self.pass_seconds, time.monotonic() - start)

    def keep(self, finding: Finding, dtype: str, tried: Try) -> None:
        """Keeps the simplest witness of an operation in a dtype."""
        key = key_of_finding(finding)
        growth = tried.doublings + tried.input_doublings
        # Rounding may put the largest weight in range a little above its bound.
        is_far = tried.changes == WEIGHTS and growth > self.reach.overflow_doublings + 1e-3
        if is_far and finding.mechanism in (mechanisms.HALF, mechanisms.OVERFLOW):
            # With weights large enough any product overflows.
            return
        known = self.witnesses.get((key, dtype))
        if known is not None and not is_simpler(tried, known[0]):
            return
        witness = Witness(
            dtype=dtype,
            changes=tried.changes,
            how=tried.how,
            doublings=tried.doublings,
            finding=finding,
        )
        self.witnesses[key, dtype] = tried, witness

    def has_witness(self, place: Place, dtype: str) -> bool:
        """Whether this operation, or its derivative, has failed in a dtype."""
        return any(key[1:4] == place and d == dtype for key, d in self.witnesses)

    def places(self) -> list[Place]:
        """The lines to drive, most urgent first.

        Left out are lines that are proved safe, or have a witness, in every dtype, and overflows
        that are far away or not among the nearest.
        """
        ranked: dict[Place, tuple[float, ...]] = {}
        for (key, _), site in self.sites.items():
            open_in = [d for d in self.passes if site.reasons.get(d) is None]
            near = min((site.doublings.get(d, math.inf) for d in open_in), default=math.inf)
            if not open_in or (site.is_overflow and near > OVERFLOW_DOUBLINGS):
                continue
            if all(self.has_witness(key[1:4], dtype) for dtype in open_in):
                continue
            rank = (site.is_overflow, site.phase != "forward", near)
            ranked[key[1:4]] = min(ranked.get(key[1:4], rank), rank)
        order = sorted(ranked, key=lambda place: ranked[place])
        overflows = [place for place in order if ranked[place][0]]
        return [place for place in order if not ranked[place][0]] + overflows[:MAX_OVERFLOWS]

    def drive(self, place: Place) -> None:
        """Moves the weights, then the inputs, on which an operation depends, along gradients."""
        guide = next(iter(self.passes.values()))
        for near in (NEAR, ALL_NEAR):
            find = partial(nearest_leaves, named=self._movable(guide), near=near)
            nearest = list(self._at_aim(guide, {}, self.inputs, place, find))
            names = set(nearest)
            if not names:
                break
            for one in nearest[:MAX_SINGLE]:
                self._zero([one], guide)
            self._zero(nearest, guide)
            for base in self._bases(place):
                if not self._is_done(place):
                    self._follow(place, names, guide, base)
            if self._is_done(place) or self.is_late():
                return
            if not self._has_other_weights(names, guide):
                break
        for index, (name, leaf) in enumerate(leaves_of(self.inputs)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not self._is_done(place):
                self._follow_input(place, index, name, guide)

    def _bases(self, place: Place) -> list[Base]:
        """The inputs on which the weights of a line are moved."""
        found = [Base(inputs=self.inputs)]
        large = enlarged(self.inputs, self.reach)
        if large is not None:
            inputs, doublings = large
            one = Base(inputs=inputs, note="inputs enlarged, ", doublings=doublings)
            if not self._is_overflow(place) or doublings < self.reach.overflow_doublings:
                found.append(one)
        if self._is_at_limit(place):
            # Such as scores below a mask of the least number of the dtype.
            found += [Base(inputs=i, note=f"{what}, ") for what, i in hidden_inputs(self.inputs)]
        return found

    def _is_at_limit(self, place: Place) -> bool:
        """Whether the values of a line reach the largest number of a dtype as given."""
        return any(
            site.is_overflow and min(site.doublings.values(), default=1.0) == 0.0
            for (key, _), site in self.sites.items()
            if key[1:4] == place
        )

    def _has_other_weights(self, names: set[str], guide: Passes) -> bool:
        """Whether there are other weights than these to move."""
        return len(names) < len(self._movable(guide))

    def _is_done(self, place: Place) -> bool:
        return all(self.has_witness(place, dtype) for dtype in self.passes)

    def _is_overflow(self, place: Place) -> bool:
        """Whether a place has no other limit than the largest number."""
        return all(site.is_overflow for (key, _), site in self.sites.items() if key[1:4] == place)

    def _movable(self, guide: Passes) -> dict[str, Tensor]:
        buffers = {n: b for n, b in movable_buffers(guide.model) if b.requires_grad}
        return movable(guide.model, buffers)

    def _at_aim(
        self,
        guide: Passes,
        values: Values,
        inputs: Any,
        place: Place,
        use: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Runs the model with `values`, and calls `use` on the value that is driven at a line.

        Empty if there is no such value or no gradient. `use` runs before the weights are put back,
        because their gradients need them.
        """
        try:
            guide.put(values)
            given = guide.cast(inputs)
            with torch.enable_grad():
                value = find_aim(lambda: guide.loss(given), place)
                return {} if value is None else use(value)
        except Exception:  # a user's model may fail in any way
            return {}
        finally:
            guide.reset()

    def _zero(self, names: Sequence[str], guide: Passes) -> None:
        """Tries these weights at 0 together, unless they are many."""
        if len(names) > MAX_ZEROED:
            return
        values = {n: torch.zeros_like(guide.tensors[n]) for n in names}
        self.attempt(
            Try(
                changes=WEIGHTS,
                how=f"{listed(names)} of zeros",
                inputs=self.inputs,
                values=values,
                doublings=math.inf,
            )
        )

    def _follow(self, place: Place, names: set[str], guide: Passes, on: Base) -> None:
        """Moves weights along the signs of gradients, in steps that double.

        Args:
            place: the operation.
            names: the weights.
            guide: the model that gives the gradients.
            on: the inputs to run on.
        """
        start = {n: t.detach().clone() for n, t in self._movable(guide).items() if n in names}
        bounds = self._bounds(place, start, on)
        values = {n: t.clone() for n, t in start.items()}
        open_in = {d for d in self.passes if not self.has_witness(place, d)}
        hidden: set[str] = set()
        for step in range(STEPS):
            leaves = {n: t for n, t in self._movable(guide).items() if n in names}
            find = partial(direction, leaves=leaves)
            signs = self._at_aim(guide, values, on.inputs, place, find)
            if not signs or self.is_late():
                break
            share = min(2.0 ** (step - DOUBLINGS), 1.0)
            for name, sign in signs.items():
                further = values[name] + share * bounds[name] * sign
                values[name] = further.clamp(-bounds[name], bounds[name])
            found = self.attempt(moved(start, values, 1.0, on), open_in - hidden)
            # An operation further on fails first: whether this one fails too shows only later.
            hidden |= {dtype for dtype, finding in found.items() if self._is_behind(finding, place)}
            for dtype in found.keys() - hidden:
                self._find_smallest_change(place, dtype, partial(moved, start, values, base=on))
            open_in -= found.keys() - hidden
            if not open_in or "float32" in found.keys() - hidden:
                return
        for dtype, finding in self.attempt(moved(start, values, 1.0, on), hidden).items():
            if key_of_finding(finding)[1:4] == place:
                self._find_smallest_change(place, dtype, partial(moved, start, values, base=on))

    def _bounds(self, place: Place, start: Values, on: Base) -> dict[str, float]:
        """How large the entries of each weight may become, by name."""
        bounds = {name: self.reach.of_weight(tensor) for name, tensor in start.items()}
        if not self._is_overflow(place):
            return bounds
        # A weight of zeros stays so: any growth of it would be too large.
        growth = 2.0 ** (self.reach.overflow_doublings - on.doublings)
        sizes = {name: float(tensor.abs().max()) for name, tensor in start.items()}
        return {name: min(bound, growth * sizes[name]) for name, bound in bounds.items()}

    def _is_behind(self, finding: Finding, place: Place) -> bool:
        """Whether what has failed runs after an operation, in the pass as given."""
        order = list(dict.fromkeys(key for key, _ in self.sites))
        key = key_of_finding(finding)
        mine = next((i for i, known in enumerate(order) if known[1:4] == place), len(order))
        return key in order and order.index(key) > mine and key[1:4] != place

    def _find_smallest_change(
        self, place: Place, dtype: str, moved: Callable[[float], Try]
    ) -> None:
        """Halves the interval between weights that are finite and weights that fail."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self.attempt(moved(middle), [dtype])
            if dtype in found and key_of_finding(found[dtype])[1:4] == place:
                high = middle
            else:
                low = middle

    def _follow_input(self, place: Place, index: int, name: str, guide: Passes) -> None:
        """Moves one input along the signs of gradients."""
        flat = leaves_of(self.inputs)
        leaf = flat[index][1].detach()
        known = self.reach.of_input(leaf)
        value = leaf.clone()
        for step in range(STEPS):
            if self.is_late() or self._is_done(place):
                return
            given = value.clone().requires_grad_(True)
            find = partial(direction, leaves={name: given})
            signs = self._at_aim(guide, {}, with_leaf(self.inputs, index, given), place, find)
            if not signs:
                return
            share = min(2.0 ** (step - DOUBLINGS), 1.0)
            value = (value + share * known.size * signs[name]).clamp(known.low, known.high)
            tried = with_leaf(self.inputs, index, value.clone())
            how = f"{name} moved: largest entry {leaf.abs().max():.3g} -> {value.abs().max():.3g}"
            self.attempt(Try(changes=INPUT, how=how, inputs=tried))
