"""From a finding to a cause: an ordered table of rules, and the line that explains it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nonfinite.limits import FLOAT32_MAX
from nonfinite.tracer import INPUT, LOSS, NORM, Finding

UNKNOWN = "unknown"

LOOKED_AT = ("train/loss", "val/loss", "grad/norm")
"""Logged metrics that the rules use."""

EXPLODED = 1e3
"""With a suitable learning rate, no weight grows beyond this value."""

DIVERGED = 1e6
"""A logit, the loss of a token, or a gradient norm above this value means divergence."""

LONGEST_SUM = 2**14
"""The largest number of products that an attention score may be the sum of."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The facts that the rules use."""

    finding: Finding | None
    """The finding; None if the rerun of the step was finite."""
    loss_finite: bool
    """Whether the loss of the original step was finite."""
    router: Mapping[str, float]
    """`router_stats` of the module in the finding if it is a router; else empty."""
    second_moment_finite: bool
    """Whether AdamW's second moments are all finite."""
    weight_absmax: float
    """The largest finite weight."""
    last: Mapping[str, float]
    """The latest logged values of the metrics in LOOKED_AT."""


def _router_underflow(evidence: Evidence) -> bool:
    """A zero score sum of finite logits; infinite logits give 0 for another reason."""
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
    return finding is not None and _made_in_forward(finding) and finding.dtype == "float16"


def _masked_row(evidence: Evidence) -> bool:
    """A softmax over a row whose entries are all masked with -inf."""
    finding = evidence.finding
    return (
        finding is not None
        and finding.phase == "forward"
        and finding.input_absmax is None
        and finding.operation.endswith("softmax")
    )


def _attention_overflow(evidence: Evidence) -> bool:
    """Inputs so large that a sum of products of two of them can overflow."""
    finding = evidence.finding
    if finding is None or finding.phase != "forward" or finding.input_absmax is None:
        return False
    overflows = finding.input_absmax**2 * LONGEST_SUM > FLOAT32_MAX
    return overflows and "attn" in _places(finding)


def _exploding_gradient(evidence: Evidence) -> bool:
    """Finite gradients that became too large for an operation, or for their own norm."""
    finding = evidence.finding
    if finding is None or finding.phase != "backward":
        return False
    grown = max(finding.input_absmax or 0.0, evidence.last.get("grad/norm", 0.0)) > DIVERGED
    return grown or finding.operation.startswith(NORM)


def _output_divergence(evidence: Evidence) -> bool:
    """A failure in the output head, or in the loss on huge finite logits."""
    finding = evidence.finding
    if finding is None or not _made_in_forward(finding):
        return False
    in_loss = finding.module == "" and (finding.input_absmax or 0.0) > DIVERGED
    return in_loss or "head" in _places(finding)


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
"""The first rule that holds is the cause. A non-finite weight means that the guard failed."""


def cause(evidence: Evidence) -> str:
    """The name of the first rule that holds, or unknown."""
    return next((name for name, holds in RULES if holds(evidence)), UNKNOWN)


def _made_in_forward(finding: Finding) -> bool:
    """Whether the finding names the operation of the forward pass that produced the values."""
    seen = not finding.operation.startswith(INPUT) and finding.operation != LOSS
    return seen and finding.phase == "forward"


def _places(finding: Finding) -> set[str]:
    """`attn` and `head`, if the finding's module or operation is attention or the output head."""
    names = f"{finding.module}.{finding.operation}".lower().split(".")
    places = set()
    if any("attn" in name or "attention" in name for name in names):
        places.add("attn")
    if {"head", "lm_head", "cross_entropy", "linear_cross_entropy", "log_softmax"} & set(names):
        places.add("head")
    return places


def describe(finding: Finding | None, router: Mapping[str, float], drift: float | None) -> str:
    """One line that says what happened.

    Args:
        finding: the finding; None if the rerun was finite.
        router: statistics of the router in the finding; empty if its module is not a router.
        drift: change of the router's mean bias per step, if known.
    """
    if finding is None:
        return "the rerun of the step is finite, so the model's arithmetic did not cause it"
    where = finding.module or "the top-level module"
    if router.get("topk_sum_min", 1.0) == 0.0:
        line = f"{where}: {_zero_sums(router)} score sum of exactly 0 (0/0)"
        # The gate of an external model may have no bias.
        if "bias_mean" in router:
            line += f"; mean bias {router['bias_mean']:.1f}"
        if drift:
            line += f", {'falling' if drift < 0 else 'rising'} {abs(drift):.4f} a step"
        return line
    share = f"{finding.num_nonfinite} of {finding.num_elements}"
    if finding.phase == "batch":
        return f"{finding.operation}: {share} elements were not finite before the step"
    if finding.phase == "weights":
        return f"{where}: {share} elements of {finding.operation} were not finite before the step"
    if finding.operation.startswith(INPUT):
        return (
            f"{where}: {finding.operation} already contains {finding.num_nonfinite} NaN/Inf values"
            f" (of {finding.num_elements}), produced by an operation that the tracer cannot see"
        )
    if finding.operation == LOSS:
        return "the loss is not finite, because of an operation that the tracer cannot see"
    inputs = (
        "" if finding.input_absmax is None else f" from inputs up to {finding.input_absmax:.3g}"
    )
    return (
        f"{where}: {finding.operation} ({finding.phase}) produced {share} non-finite elements"
        f"{inputs}"
    )


def _zero_sums(router: Mapping[str, float]) -> str:
    """How many tokens have a score sum of 0, as far as the router's statistics say."""
    if not {"num_zero_sums", "num_tokens", "top_k"} <= set(router):
        return "some tokens have a"
    num_zero, num_tokens, top_k = (router[n] for n in ("num_zero_sums", "num_tokens", "top_k"))
    return f"{num_zero:.0f} of {num_tokens:.0f} tokens have a top-{top_k:.0f}"


def supporting_values(finding: Finding | None, router: Mapping[str, float]) -> dict[str, Any]:
    """The values that support the cause, by name."""
    facts: dict[str, Any] = dict(router)
    if finding is not None:
        facts |= {"num_nonfinite": finding.num_nonfinite, "input_absmax": finding.input_absmax}
    return facts
