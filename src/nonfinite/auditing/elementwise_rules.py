"""Bounds of operations on single elements: arithmetic, functions, clamps."""

import math
from collections.abc import Callable
from dataclasses import replace

from nonfinite.auditing.value_ranges import (
    INF,
    Known,
    Rule,
    Step,
    exactly,
    hull,
    named,
    over,
    plus,
    square,
    times,
    widened,
)


def _add(step: Step) -> Known:
    a, b, alpha = step.of(0), step.of(1), float(step.kwargs.get("alpha", 1) or 1)
    known = plus(a, b, alpha=alpha)
    if step.name == "sub":
        known = plus(a, times(b, exactly(-1.0)), alpha=alpha)
        if b.max_of and b.max_of == a.token and alpha == 1:
            # The maximum itself gives 0.
            return Known(low=known.low, high=min(known.high, 0.0), peak=0.0)
        return known
    grown = next((x for x, y in ((a, b), (b, a)) if x.low >= 0 and y.low >= 0 and alpha > 0), None)
    for x, y in ((a, b), (b, a)):
        if y.low >= 0 and alpha > 0 and (x.mean_square_of or x.sum_of or x.root_of):
            known = replace(
                known, mean_square_of=x.mean_square_of, sum_of=x.sum_of, root_of=x.root_of
            )
    if grown is not None and known.low > 0:
        eps = max(a.low, b.low)
        old = a.why if a.low >= b.low else b.why
        known = replace(known, why=f"{eps:.3g} is added to a value that cannot be negative")
        if old and not isinstance(step.get(1), int | float):
            known = replace(known, why=old)
    return known


def _rsub(step: Step) -> Known | None:
    if step.get(2, "alpha", 1) != 1:
        return None
    return plus(step.of(1), times(step.of(0), exactly(-1.0)))


def _mul(step: Step) -> Known:
    a, b = step.of(0), step.of(1)
    if a.token and a.token == b.token:
        return replace(square(a), square_of=a.token, why=a.why)
    for x, y in ((a, b), (b, a)):
        if y.inverse_of is not None and y.inverse_of[0] == x.token and x.token:
            bound = y.inverse_of[1] * SQUEEZE
            inside = times(x, y)
            return Known(low=max(inside.low, -bound), high=min(inside.high, bound))
    known = times(a, b)
    positive = known.low > 0 and a.low > 0
    return replace(known, why=a.why or b.why) if positive else known


SQUEEZE = 1.5
"""A value divided by its own root mean square may exceed its bound by this factor, by rounding."""


def _div(step: Step) -> Known | None:
    a, b = step.of(0), step.of(1)
    if step.kwargs.get("rounding_mode") is not None:
        return None
    if a.token and a.low >= 0 and b.sum_of == a.token and b.excludes_zero:
        return Known(low=0.0, high=SQUEEZE)
    if a.token and b.root_of is not None and b.root_of[0] == a.token and b.excludes_zero:
        bound = b.root_of[1] * SQUEEZE
        return Known(low=-bound, high=bound)
    known = over(a, b)
    return replace(known, why=a.why) if known.low > 0 else known


def _pow(step: Step) -> Known | None:
    base, power = step.of(0), step.get(1)
    if not isinstance(power, int | float):
        return None
    if power == 2:
        return replace(square(base), square_of=base.token, why=base.why)
    if isinstance(power, int) or float(power).is_integer():
        if power > 0 and int(power) % 2 == 0:
            top = _power(base.size, power)
            least = (
                0.0
                if base.low <= 0 <= base.high
                else _power(min(abs(base.low), abs(base.high)), power)
            )
            return widened(Known(low=least, high=top), smallest=step.smallest)
        if power > 0:
            known = Known(low=_power(base.low, power), high=_power(base.high, power))
            return widened(known, smallest=step.smallest)
    if base.low < 0 or (base.low == 0 and power < 0):
        return None
    ends = sorted((_power(base.low, power), _power(base.high, power)))
    known = replace(widened(Known(low=ends[0], high=ends[1]), smallest=step.smallest), why=base.why)
    if power == -0.5 and base.mean_square_of is not None:
        token, number = base.mean_square_of
        return replace(known, inverse_of=(token, math.sqrt(number)))
    if power == 0.5 and base.mean_square_of is not None:
        token, number = base.mean_square_of
        return replace(known, root_of=(token, math.sqrt(number)))
    return known


def _power(value: float, power: float) -> float:
    try:
        return float(value**power)
    except OverflowError:
        return INF if value > 0 or int(power) % 2 == 0 else -INF
    except ZeroDivisionError:
        return INF


def _sqrt(step: Step) -> Known:
    a = step.of(0)
    known = Known(low=math.sqrt(max(a.low, 0.0)), high=_root(a.high), why=a.why)
    if a.mean_square_of is None:
        return known
    token, number = a.mean_square_of
    return replace(known, root_of=(token, math.sqrt(number)))


def _rsqrt(step: Step) -> Known | None:
    a = step.of(0)
    if a.low <= 0:
        return None
    low = 0.0 if a.high == INF else 1 / math.sqrt(a.high)
    known = widened(Known(low=low, high=1 / math.sqrt(a.low)), smallest=step.smallest)
    if a.mean_square_of is None:
        return known
    token, number = a.mean_square_of
    return replace(known, inverse_of=(token, math.sqrt(number)))


def _root(value: float) -> float:
    return INF if value == INF else math.sqrt(max(value, 0.0))


def _reciprocal(step: Step) -> Known:
    return over(exactly(1.0), step.of(0))


def _rising(function: Callable[[float], float]) -> Rule:
    """A function that never falls, and is not rounded exactly."""

    def rule(step: Step) -> Known:
        a = step.of(0)
        known = Known(low=_at(function, a.low), high=_at(function, a.high))
        if step.name in ("exp", "exp2") and a.peak is not None:
            known = replace(known, peak=_at(function, a.peak) / 2)
        known = widened(known, smallest=step.smallest)
        return replace(known, why="its operand is bounded") if known.low > 0 else known

    return rule


def _at(function: Callable[[float], float], value: float) -> float:
    try:
        return function(value)
    except OverflowError:
        return INF if value > 0 else 0.0
    except ValueError:
        return -INF


def _sigmoid_of(value: float) -> float:
    if value < 0:
        return math.exp(value) / (1 + math.exp(value)) if value > -700 else 0.0
    return 1 / (1 + math.exp(-value))


def _within(low: float, high: float) -> Rule:
    return lambda step: Known(low=low, high=high)


def _sigmoid(step: Step) -> Known:
    a = step.of(0)
    known = Known(low=_sigmoid_of(a.low), high=_sigmoid_of(a.high))
    known = widened(known, smallest=step.smallest)
    why = "its operand is bounded" if known.low > 0 else ""
    return replace(known, high=min(1.0, known.high), why=why)


def _relu(step: Step) -> Known:
    a = step.of(0)
    return Known(low=max(a.low, 0.0), high=max(a.high, 0.0), why=a.why)


def _softplus(step: Step) -> Known:
    beta = abs(float(step.get(1, "beta", 1))) or 1.0
    return Known(low=0.0, high=max(step.of(0).high, 0.0) + 1.0 / beta)


def _gated(step: Step) -> Known:
    """Of silu, gelu and mish: between a small negative number and the operand."""
    return Known(low=-0.5, high=max(step.of(0).high, 0.0))


def _abs(step: Step) -> Known:
    a = step.of(0)
    least = 0.0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high))
    return Known(low=least, high=a.size, why=a.why if least > 0 else "", sum_of=0)


def _neg(step: Step) -> Known:
    return times(step.of(0), exactly(-1.0))


def _clamp(step: Step) -> Known:
    a = step.of(0)
    bottom = step.get(1, "min") if step.name != "clamp_max" else None
    top = step.get(2, "max") if step.name == "clamp" else None
    if step.name == "clamp_max":
        top = step.get(1, "max")
    low, high, why = a.low, a.high, a.why
    if bottom is not None:
        least = step.known(bottom)
        if least.low > low:
            why = f"it is clamped to at least {least.low:.3g}" if least.low > 0 else ""
        low, high = max(low, least.low), max(high, least.high)
    if top is not None:
        most = step.known(top)
        low, high = min(low, most.low), min(high, most.high)
    known = Known(low=low, high=high, why=why if low > 0 else "")
    if top is None:
        # Only greater than before: what bounds the values from below still does.
        return replace(known, mean_square_of=a.mean_square_of, sum_of=a.sum_of, root_of=a.root_of)
    return known


def extreme(step: Step) -> Known:
    """Elementwise maximum and minimum."""
    a, b = step.of(0), step.of(1)
    pick = max if step.name == "maximum" else min
    low, high = pick(a.low, b.low), pick(a.high, b.high)
    stronger = a if a.low >= b.low else b
    why = "its maximum with a positive number is taken" if low > 0 and not stronger.why else ""
    return Known(low=low, high=high, why=(stronger.why or why) if low > 0 else "")


def _dropout(step: Step) -> Known:
    rate = float(step.get(1, "p", 0.5))
    return hull(times(step.of(0), exactly(1 / max(1 - rate, 1e-6))), exactly(0.0))


ELEMENTWISE: dict[str, Rule] = {
    **named(_add, "add", "sub"),
    **named(_rsub, "rsub"),
    **named(_mul, "mul"),
    **named(_div, "div", "true_divide"),
    **named(_pow, "pow"),
    **named(lambda step: square(step.of(0)), "square"),
    **named(_sqrt, "sqrt"),
    **named(_rsqrt, "rsqrt"),
    **named(_reciprocal, "reciprocal"),
    **named(_rising(math.exp), "exp"),
    **named(_rising(lambda x: 2.0**x), "exp2"),
    **named(_rising(math.log), "log"),
    **named(_rising(lambda x: math.log1p(x)), "log1p"),
    **named(_sigmoid, "sigmoid"),
    **named(_within(-1.0, 1.0), "tanh", "sin", "cos", "erf", "sign", "sgn"),
    **named(_within(-math.pi / 2, math.pi), "acos", "atan", "asin"),
    **named(_within(-3.2, 3.2), "atan2"),
    **named(_relu, "relu"),
    **named(_softplus, "softplus"),
    **named(_gated, "silu", "gelu", "mish"),
    **named(_abs, "abs"),
    **named(_neg, "neg"),
    **named(_clamp, "clamp", "clamp_min", "clamp_max"),
    **named(extreme, "maximum", "minimum"),
    **named(_dropout, "native_dropout"),
    **named(_within(0.0, 1.0), "rand", "rand_like", "bernoulli"),
    **named(_within(0.0, INF), "bincount", "histc"),
}
"""The rule of each operation."""
