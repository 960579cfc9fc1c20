"""From a finding to a cause: a table of rules, each with the figures that support it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nonfinite.limits import FLOAT32_MAX
from nonfinite.tracer import INPUT, LOSS, NORM, Finding

UNKNOWN = "unknown"

LOOKED_AT = ("train/loss", "val/loss", "grad/norm")
"""Logged figures that rules look at."""

EXPLODED = 1e3
"""A weight above it is none that training with a fitting rate makes."""

DIVERGED = 1e6
"""A logit, the loss of a token, or a gradient above it is none that a model can mean."""

LONGEST_SUM = 2**14
"""Products that one entry of an attention's scores may be the sum of."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules may look at."""

    finding: Finding | None
    """None where running the step again was finite."""
    loss_finite: bool
    """Whether the loss of the step itself was."""
    router: Mapping[str, float]
    """`router_stats` of the module that was named, if it is a router; else empty."""
    second_moment_finite: bool
    """Whether AdamW's second moments are all finite."""
    weight_absmax: float
    """The largest finite weight."""
    last: Mapping[str, float]
    """The latest values of the figures in LOOKED_AT that have been logged."""


def _router_underflow(evidence: Evidence) -> bool:
    """Scores of finite logits: those of infinite ones are 0 for another reason."""
    logit = evidence.router.get("picked_logit_min", 0.0)
    return evidence.router.get("topk_sum_min", 1.0) == 0.0 and math.isfinite(logit)


def _second_moment(evidence: Evidence) -> bool:
    return not evidence.second_moment_finite


def _guard_failure(evidence: Evidence) -> bool:
    return evidence.finding is not None and evidence.finding.phase == "weights"


def _bad_batch(evidence: Evidence) -> bool:
    return evidence.finding is not None and evidence.finding.phase == "batch"


def _exploding_weights(evidence: Evidence) -> bool:
    return evidence.weight_absmax > EXPLODED


def _float16_overflow(evidence: Evidence) -> bool:
    finding = evidence.finding
    return finding is not None and _is_made(finding) and finding.dtype == "float16"


def _masked_row(evidence: Evidence) -> bool:
    """A softmax over nothing but a mask's infinities."""
    finding = evidence.finding
    return (
        finding is not None
        and finding.phase == "forward"
        and finding.input_absmax is None
        and finding.operation.endswith("softmax")
    )


def _attention_overflow(evidence: Evidence) -> bool:
    """Inputs so large that a sum of products of two of them can be infinite."""
    finding = evidence.finding
    if finding is None or finding.phase != "forward" or finding.input_absmax is None:
        return False
    overflows = finding.input_absmax**2 * LONGEST_SUM > FLOAT32_MAX
    return overflows and "attn" in _words(finding)


def _exploding_gradient(evidence: Evidence) -> bool:
    """Finite gradients that grew too large for an operation, or for their own norm."""
    finding = evidence.finding
    if finding is None or finding.phase != "backward":
        return False
    grown = max(finding.input_absmax or 0.0, evidence.last.get("grad/norm", 0.0)) > DIVERGED
    return grown or finding.operation.startswith(NORM)


def _output_divergence(evidence: Evidence) -> bool:
    """In the head, or in what the loss makes of numbers that it has let through."""
    finding = evidence.finding
    if finding is None or not _is_made(finding):
        return False
    in_loss = finding.module == "" and (finding.input_absmax or 0.0) > DIVERGED
    return in_loss or "head" in _words(finding)


def _bad_gradient(evidence: Evidence) -> bool:
    return evidence.finding is not None and evidence.finding.phase == "backward"


def _overfitting(evidence: Evidence) -> bool:
    train, val = evidence.last.get("train/loss"), evidence.last.get("val/loss")
    no_operation = evidence.finding is None and evidence.loss_finite
    return no_operation and train is not None and val is not None and val > 2 * train + 1


RULES: list[tuple[str, Callable[[Evidence], bool]]] = [
    ("router underflow", _router_underflow),
    ("optimizer second moment", _second_moment),
    ("guard failure", _guard_failure),
    ("bad batch", _bad_batch),
    ("exploding weights", _exploding_weights),
    ("float16 overflow", _float16_overflow),
    ("fully masked row", _masked_row),
    ("attention overflow", _attention_overflow),
    ("output divergence", _output_divergence),
    ("exploding gradient", _exploding_gradient),
    ("bad gradient", _bad_gradient),
    ("overfitting rather than instability", _overfitting),
]
"""In order; the first that holds is the cause. A weight that is not finite got past the guard."""


def cause(evidence: Evidence) -> str:
    """The first rule that holds, or unknown."""
    return next((name for name, holds in RULES if holds(evidence)), UNKNOWN)


def _is_made(finding: Finding) -> bool:
    """Whether an operation of the forward pass is named as what made the numbers."""
    seen = not finding.operation.startswith(INPUT) and finding.operation != LOSS
    return seen and finding.phase == "forward"


def _words(finding: Finding) -> set[str]:
    """Kinds of place that the finding's names speak of."""
    names = f"{finding.module}.{finding.operation}".lower().split(".")
    words = set()
    if any("attn" in name or "attention" in name for name in names):
        words.add("attn")
    if {"head", "lm_head", "cross_entropy", "linear_cross_entropy", "log_softmax"} & set(names):
        words.add("head")
    return words


def describe(finding: Finding | None, router: Mapping[str, float], drift: float | None) -> str:
    """What happened, in one line.

    Args:
        finding: the operation, or None.
        router: figures of the router that was named, or nothing.
        drift: change of its mean bias a step, if known.
    """
    if finding is None:
        return "the step run again is finite: it was not the model's arithmetic"
    where = finding.module or "the module itself"
    if router.get("topk_sum_min", 1.0) == 0.0:
        line = f"{where}: {_zero_sums(router)} score sum of exactly 0 (0/0)"
        # A gate of somebody else's may have no bias.
        if "bias_mean" in router:
            line += f"; mean bias {router['bias_mean']:.1f}"
        if drift:
            line += f", {'falling' if drift < 0 else 'rising'} {abs(drift):.4f} a step"
        return line
    what = f"{finding.num_nonfinite} of {finding.num_elements} elements"
    if finding.phase == "batch":
        return f"{finding.operation}: {what} are not finite before the step"
    if finding.phase == "weights":
        return f"{where}: {what} of {finding.operation} are not finite before the step"
    if finding.operation.startswith(INPUT):
        return f"{where}: {what} of an {finding.operation} are NaN or infinite, made out of sight"
    if finding.operation == LOSS:
        return "the loss is not finite, made so out of sight of the operations"
    inputs = (
        "" if finding.input_absmax is None else f" from inputs up to {finding.input_absmax:.3g}"
    )
    return f"{where}: {finding.operation} ({finding.phase}) made {what} non-finite{inputs}"


def _zero_sums(router: Mapping[str, float]) -> str:
    """Whose sums are 0, as far as the router says it."""
    if not {"num_zero_sums", "num_tokens", "top_k"} <= set(router):
        return "some tokens have a"
    num_zero, num_tokens, top_k = (router[n] for n in ("num_zero_sums", "num_tokens", "top_k"))
    return f"{num_zero:.0f} of {num_tokens:.0f} tokens have a top-{top_k:.0f}"


def figures(finding: Finding | None, router: Mapping[str, float]) -> dict[str, Any]:
    """The figures that support the cause, by name."""
    facts: dict[str, Any] = dict(router)
    if finding is not None:
        facts |= {"num_nonfinite": finding.num_nonfinite, "input_absmax": finding.input_absmax}
    return facts
