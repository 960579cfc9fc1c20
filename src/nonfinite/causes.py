"""From what is known about a failed step to its cause: an ordered table of rules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nonfinite import mechanisms as how
from nonfinite.finding import INPUT, LOSS, NORM, Finding
from nonfinite.update_check import CHANGED, RATE, UPDATE, UpdateFault

UNKNOWN = "unknown"
WEIGHTS = "non-finite weights"
BATCH = "bad batch"
SPIKE = "spike"
NOT_REPRODUCED = "not reproduced"
OUTSIDE_LOSS = "loss outside the model"

LOOKED_AT = ("train/loss", "val/loss", "grad/norm")
"""Logged metrics that the rules use."""

EXPLODED = 1e3
"""A weight above this value has exploded; healthy ones stay far below it (a rule of thumb)."""

DIVERGED = 1e6
"""A logit, the loss of a token, or a gradient norm above this value means divergence."""


REDUCTIONS = ("mean", "sum", "cross_entropy", "log_softmax", "logsumexp")
"""Functions that losses end with."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The facts that the rules use."""

    finding: Finding | None
    """The finding; None if the rerun of the step was finite, or if there was no rerun."""
    failed: bool = True
    """Whether loss or gradient of the original step were not finite."""
    router: Mapping[str, float]
    """`router_stats` of the module in the finding if it is a router; else empty."""
    second_moment_finite: bool
    """Whether AdamW's second moments are all finite."""
    weight_absmax: float
    """The largest finite weight."""
    last: Mapping[str, float]
    """The latest logged values of the metrics in LOOKED_AT."""
    update: UpdateFault | None = None
    """What went wrong between the gradient and the weights, if it did."""
    why_finite: str | None = None
    """What differs between the step and its rerun, or why there was no rerun, as a sentence."""


def _router_underflow(evidence: Evidence) -> bool:
    """A zero score sum of finite logits; infinite logits give 0 for another reason."""
    logit = evidence.router.get("picked_logit_min", 0.0)
    return evidence.router.get("topk_sum_min", 1.0) == 0.0 and math.isfinite(logit)


def _in(phase: str) -> Callable[[Evidence], bool]:
    return lambda evidence: evidence.finding is not None and evidence.finding.phase == phase


def _made_by(*mechanisms: str) -> Callable[[Evidence], bool]:
    return lambda evidence: (
        evidence.finding is not None and evidence.finding.mechanism in mechanisms
    )


def _updated(cause: str, evidence: Evidence) -> bool:
    return evidence.update is not None and evidence.update.cause == cause


def _attention_overflow(evidence: Evidence) -> bool:
    """An overflow in a module whose path says that it is attention."""
    finding = evidence.finding
    overflows = _made_by(how.OVERFLOW)(evidence) and _in("forward")(evidence)
    return overflows and finding is not None and "attn" in _places(finding)


def _exploding_gradient(evidence: Evidence) -> bool:
    """Finite gradients that became too large for an operation, or for their own norm."""
    finding = evidence.finding
    if finding is None or finding.phase != "backward" or finding.mechanism == how.WRITTEN:
        return False
    grown = max(finding.input_absmax or 0.0, evidence.last.get("grad/norm", 0.0)) > DIVERGED
    return grown or finding.operation.startswith(NORM)


def _output_divergence(evidence: Evidence) -> bool:
    """An overflow in the output head, or in the loss, from huge finite logits."""
    finding = evidence.finding
    if finding is None or finding.phase != "forward" or finding.mechanism != how.OVERFLOW:
        return False
    name = finding.operation.rpartition(".")[2]
    is_large = (finding.input_absmax or 0.0) > DIVERGED
    in_loss = finding.module == "" and is_large and (name in REDUCTIONS or "loss" in name)
    return in_loss or "head" in _places(finding)


def _bad_gradient(evidence: Evidence) -> bool:
    """A non-finite gradient that a hook or a user's backward pass wrote."""
    finding = evidence.finding
    written = finding is not None and (
        finding.mechanism == how.WRITTEN or finding.operation.startswith("gradient of")
    )
    return written and _in("backward")(evidence)


def _was_given(evidence: Evidence) -> bool:
    """An operation read a value that was not finite, and that no operation of the step had made."""
    return evidence.finding is not None and evidence.finding.operation.startswith(INPUT)


RULES: tuple[tuple[str, Callable[[Evidence], bool]], ...] = (
    *((name, partial(_updated, name)) for name in (RATE, CHANGED, UPDATE)),
    ("router underflow", _router_underflow),
    ("optimizer second moment", lambda evidence: not evidence.second_moment_finite),
    (WEIGHTS, _in("weights")),
    (BATCH, _in("batch")),
    *(
        (name, _made_by(name))
        for name in (
            how.ZERO,
            how.LOG,
            how.EDGE,
            how.DOMAIN,
            how.ZERO_INF,
            how.INF_INF,
            how.MASKED,
            how.NO_LABEL,
            how.CTC,
            how.EMPTY,
            how.ONE,
            how.TINY,
        )
    ),
    ("exploding weights", lambda e: e.finding is not None and e.weight_absmax > EXPLODED),
    (how.HALF, _made_by(how.HALF)),
    (how.EXP, _made_by(how.EXP)),
    ("attention overflow", _attention_overflow),
    ("output divergence", _output_divergence),
    ("exploding gradient", _exploding_gradient),
    (how.OVERFLOW, _made_by(how.OVERFLOW)),
    ("bad gradient", _bad_gradient),
    (how.WRITTEN, _made_by(how.WRITTEN)),
    (how.GIVEN, lambda evidence: _made_by(how.GIVEN)(evidence) or _was_given(evidence)),
    (OUTSIDE_LOSS, _in("loss")),
    (NOT_REPRODUCED, lambda evidence: evidence.finding is None and evidence.failed),
)
"""The first rule that holds is the cause."""

ADVICE = {
    RATE: "check the schedule: a warm-up or decay over 0 steps divides by 0",
    CHANGED: "look at your clipping: dividing by a norm of 0 is NaN;"
    " add an epsilon, or use torch.nn.utils.clip_grad_norm_",
    UPDATE: "give the optimizer's divisor an epsilon that the weights' dtype can hold"
    " (1e-4 in float16), or keep the weights in float32",
    "router underflow": "add an epsilon to the sum of scores, and keep the bias out of the scores",
    "optimizer second moment": "go back to an earlier checkpoint, and clip the gradient",
    WEIGHTS: "use an earlier checkpoint, and find the step that did the damage",
    BATCH: "check this sample where it is loaded or computed; drop it, or mask it before the loss",
    how.ZERO: "add an epsilon to the divisor, or leave out the rows where it is 0",
    how.TINY: "raise the epsilon of the divisor",
    how.LOG: "clamp the operand away from 0, or use log_softmax or logsigmoid",
    how.EDGE: "add an epsilon inside the function or clamp its operand off the edge; masking its"
    " result afterwards does not help",
    how.DOMAIN: "clamp the operand to the function's domain",
    how.ZERO_INF: "use masked_fill or where in place of multiplying by an infinity",
    how.INF_INF: "use a large finite number in place of the infinity",
    how.MASKED: "let every row see one key (itself), or set the rows that see none to 0",
    how.NO_LABEL: "skip batches without a valid label, or divide by max(count, 1)",
    how.CTC: "drop samples whose target is longer than their input, or set zero_infinity=True",
    how.EMPTY: "skip the mean if nothing was selected, or divide by max(count, 1)",
    how.ONE: "use correction=0, or skip groups of one element",
    "exploding weights": "lower the learning rate, or clip the gradient; use an earlier checkpoint",
    how.HALF: "compute this operation in float32 or bfloat16",
    how.EXP: "subtract the maximum first, clamp the operand, or work with logarithms",
    "attention overflow": "normalise queries and keys (QK-norm), or lower the learning rate",
    "output divergence": "add a z-loss, or lower the learning rate",
    "exploding gradient": "clip the gradient, or lower the learning rate",
    how.OVERFLOW: "scale the operands down, or normalise them",
    "bad gradient": "look at the hook or the custom backward function at this place",
    how.WRITTEN: "follow the written value to the loss: something there does not mask it",
    how.GIVEN: "find where this tensor comes from: a target, a state kept between steps, or a"
    " constant",
    OUTSIDE_LOSS: "pass loss_of= to examine the loss too",
    NOT_REPRODUCED: "run with the same seed again; if it fails at another step, suspect what is"
    " outside the model",
    SPIKE: "look at this batch; clip the gradient, or lower the learning rate",
}
"""What usually helps, by cause."""


def cause(evidence: Evidence) -> str:
    """The name of the first rule that holds, or unknown."""
    return next((name for name, holds in RULES if holds(evidence)), UNKNOWN)


def explanation(evidence: Evidence, cause: str) -> str:
    """One or two sentences on the cause, with the operand that did it."""
    finding = evidence.finding
    if evidence.update is not None:
        return evidence.update.explanation
    if finding is None:
        return evidence.why_finite or "The rerun of the step was finite; what differs is unknown."
    if cause == WEIGHTS:
        return (
            f"{finding.operation} of {finding.module or 'the top-level module'} was not finite"
            " before this step: an earlier step damaged it, or it was loaded like that."
        )
    if cause == BATCH:
        share = f"{finding.num_nonfinite} of {finding.num_elements}"
        row = f", the first in row {finding.positions[0][0]}" if finding.positions[0] else ""
        return f"{finding.operation} came in with {share} non-finite elements{row}."
    if cause == OUTSIDE_LOSS:
        return (
            "The model's outputs are finite, and the gradient that came back to them is not: the"
            " loss, which is computed outside the model, made it."
        )
    if cause == "exploding weights":
        return (
            f"The largest weight is {evidence.weight_absmax:.3g}, and {finding.place} overflows"
            " with such weights."
        )
    if _was_given(evidence):
        return (
            f"{finding.num_nonfinite} of {finding.num_elements} elements were NaN or infinite when"
            " this step first read them, and no operation that the tracer saw had made them."
        )
    if finding.detail is not None:
        return f"{finding.detail[0].upper()}{finding.detail[1:]}."
    size = finding.input_absmax
    operands = "" if size is None else f" from operands up to {size:.3g}"
    return f"{finding.place} gave a non-finite result{operands}; the operands do not say how."


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
        return "not reproduced: the rerun of the step is finite"
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
    if finding.phase in ("batch", "weights"):
        place = finding.operation if finding.phase == "batch" else f"{where}: {finding.operation}"
        return f"{place}: {share} elements were not finite before the step"
    if finding.phase == "loss":
        return f"the gradient that the loss sent to {finding.operation} is not finite"
    if finding.operation.startswith(INPUT):
        return (
            f"{finding.place} holds {finding.num_nonfinite} NaN or infinite values of"
            f" {finding.num_elements}, which no operation of the step made"
        )
    if finding.operation == LOSS:
        return "the loss is not finite, because of an operation that the tracer cannot see"
    size = finding.input_absmax
    inputs = "" if size is None else f" from inputs up to {size:.3g}"
    return f"{finding.place} ({finding.phase}) produced {share} non-finite elements{inputs}"


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
