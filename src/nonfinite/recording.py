"""Makes an incident of a failed step: runs it again under the tracer, explains it, saves it."""

import copy
import html
import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonfinite.builders import MEANING, PLACEHOLDER
from nonfinite.causes import (
    ADVICE,
    SPIKE,
    UNKNOWN,
    Evidence,
    cause,
    describe,
    explanation,
    supporting_values,
)
from nonfinite.finding import Finding, Growth, as_recorded, is_alike, is_same
from nonfinite.incident_files import json_safe, unreadable_type, write_page
from nonfinite.rerun import ConsumedError, router_stats_at, undisturbed
from nonfinite.tracer import Tracer

logger = logging.getLogger(__name__)

Pass = Callable[[nn.Module, Tracer], Finding | None]
"""Runs one recorded forward and backward pass of a module, or of a copy of it."""


COMPILED = (
    "The model is compiled, and its rerun was eager and finite: compiled and eager code differ"
    " here, so look at the compiler or its backend."
)


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What the reruns of a step showed."""

    finding: Finding | None = None
    router: Mapping[str, float]
    """Statistics of the router in the finding; empty if its module is not a router."""
    growth: Growth | None = None
    reproduced: bool | None = None
    """Whether the rerun failed too; None if there was none."""
    reruns: str | None = None
    """How a second rerun on the same device compares: bitwise, in kind, or differs."""
    on_cpu: str | None = None
    """How a rerun on the CPU compares, for a step on a GPU: in kind, differs, or not possible."""
    why_finite: str | None = None


def run_again(module: nn.Module, passes: Sequence[Pass], *, measures_growth: bool = False) -> Rerun:
    """Runs the passes of a step twice, and restores the module afterwards.

    Args:
        module: the module with the weights of the step.
        passes: one function for each micro-batch; each restores the random state first.
        measures_growth: also finds the operation at which gradients grow most; then the passes are
            run once.
    """
    try:
        with undisturbed(module):
            finding, growth = _all_passes(module, passes, measures_growth=measures_growth)
            router: dict[str, float] = {}
            if finding is not None and finding.phase == "forward":
                router = router_stats_at(module, finding.module)
            if finding is None:
                return Rerun(
                    router={}, growth=growth, reproduced=False, why_finite=_difference(module)
                )
            for parameter in module.parameters():
                parameter.grad = None
            second, _ = _all_passes(module, passes)
    except ConsumedError as used:
        return Rerun(
            router={},
            why_finite=f"The step was not run again: it draws from {used}, and a rerun would take"
            " what training needs. What it drew may be the cause.",
        )
    recorded = as_recorded(finding)
    reruns = "differs"
    if is_alike(second, recorded):
        reruns = "bitwise" if is_same(second, recorded) else "in kind"
    return Rerun(
        finding=finding,
        router=router,
        reproduced=True,
        reruns=reruns,
        on_cpu=_on_cpu(module, passes, recorded),
    )


def _all_passes(
    module: nn.Module, passes: Sequence[Pass], *, measures_growth: bool = False
) -> tuple[Finding | None, Growth | None]:
    """The finding of the first pass that has one, and the largest growth of all."""
    growths = []
    for run in passes:
        tracer = Tracer(module, measures_growth=measures_growth)
        finding = run(module, tracer)
        if finding is not None:
            return finding, None
        growths += [] if tracer.growth is None else [tracer.growth]
    return None, max(growths, key=lambda growth: growth.factor, default=None)


def _on_cpu(module: nn.Module, passes: Sequence[Pass], recorded: Mapping[str, Any]) -> str | None:
    """Runs the step of a GPU on a copy of the module on the CPU."""
    if not any(parameter.is_cuda for parameter in module.parameters()):
        return None
    try:
        replica = copy.deepcopy(module).cpu()
        with undisturbed(replica):
            finding, _ = _all_passes(replica, passes)
    # A user's module may not allow copies, or may run on a GPU only.
    except Exception:
        return "not possible"
    return "in kind" if is_alike(finding, recorded) else "differs"


def _difference(module: nn.Module) -> str:
    """Why a rerun may be finite although the step was not."""
    compiled = any(
        getattr(inner, "_compiled_call_impl", None) is not None or hasattr(inner, "_orig_mod")
        for inner in module.modules()
    )
    if compiled:
        return COMPILED
    return (
        "The rerun with the same weights, batch and random state was finite. What differs is"
        " outside of them: state that the module does not hold, operations that are not"
        " deterministic, or the hardware."
    )


def make_incident(
    step: int,
    evidence: Evidence,
    rerun: Rerun,
    *,
    drift: float | None = None,
    largest_gradients: Mapping[str, float | None],
) -> dict[str, Any]:
    """The content of incident.json for a step that was not finite; `next` is set when it is saved.

    Args:
        step: the step, from 1.
        evidence: the facts for the rules.
        rerun: what the reruns showed.
        drift: change of the mean bias of the finding's router per step, if known.
        largest_gradients: norms of the largest gradients, by parameter.
    """
    finding, update = evidence.finding, evidence.update
    name = cause(evidence)
    line = describe(finding, rerun.router, drift)
    if update is not None:
        line = update.summary
    elif finding is None and rerun.reproduced is None:
        line = "not reproduced: the step was not run again"
    figures = supporting_values(finding, rerun.router)
    return {
        "step": step,
        "kind": "non-finite",
        "phase": "update" if update is not None else getattr(finding, "phase", None),
        "module": "" if update is not None else getattr(finding, "module", None),
        "operation": update.operation if update is not None else _operation(finding),
        "source": None if finding is None else as_recorded(finding)["source"],
        "cause": name,
        "explanation": explanation(evidence, name),
        "advice": ADVICE.get(name),
        "reproduced": rerun.reproduced,
        "reruns": rerun.reruns,
        "on_cpu": rerun.on_cpu,
        "next": None,
        "line": f"step {step}: {line}",
        "finding": None if finding is None else as_recorded(finding),
        "figures": {**figures, **({} if update is None else update.figures)},
        "largest_gradients": dict(largest_gradients),
    }


def _operation(finding: Finding | None) -> str | None:
    return None if finding is None else finding.operation


def make_spike(
    step: int,
    norm: float,
    rerun: Rerun,
    *,
    row: Mapping[str, Any] | None,
    largest_gradients: Mapping[str, float | None],
) -> dict[str, Any]:
    """The content of incident.json for a step whose gradient norm is far above those before it."""
    growth = rerun.growth
    parameter = next(iter(largest_gradients), "no parameter")
    text = f"The gradient norm is {norm:.4g}, far above the steps before it; it is largest in"
    text += f" {parameter}."
    if growth is not None:
        where = growth.module or "the top-level module"
        text += (
            f" The gradient grows most in {growth.operation} of {where}: {growth.factor:.2g} times."
        )
    if row is not None:
        text += f" Without row {row['row']} of the batch the norm is {row['norm_without']:.3g}."
    source = None if growth is None or growth.source is None else vars(growth.source)
    return {
        "step": step,
        "kind": "spike",
        "phase": "backward",
        "module": None if growth is None else growth.module,
        "operation": None if growth is None else growth.operation,
        "source": source,
        "cause": SPIKE,
        "explanation": text,
        "advice": ADVICE[SPIKE],
        "reproduced": rerun.reproduced,
        "reruns": None,
        "on_cpu": None,
        "next": None,
        "line": f"step {step}: gradient norm {norm:.4g} is a large spike, largest in {parameter}",
        "finding": None,
        "figures": {"grad_norm": norm, **(row or {})},
        "largest_gradients": dict(largest_gradients),
    }


def unrecorded(step: int, kind: str, error: Exception) -> dict[str, Any]:
    """An incident that could not be recorded."""
    line = f"step {step}: {kind}; it could not be recorded ({type(error).__name__}: {error})"
    empty = dict.fromkeys(("module", "source", "advice", "next", "explanation"))
    return {"step": step, "kind": kind, **empty, "cause": UNKNOWN, "line": line}


def save(
    folder: Path,
    incident: dict[str, Any],
    state: Mapping[str, Any],
    ring: Sequence[Mapping[str, float]],
    *,
    command: str | None,
) -> list[str]:
    """Saves an incident, its state and its page; sets `next`.

    Errors are only reported, because the finding must not be lost with them.

    Args:
        folder: the incident's folder, which is created.
        incident: from `make_incident` or `make_spike`.
        state: tensors and plain values to run the step again.
        ring: metrics of the last steps.
        command: the command that runs the step again, with `{folder}` for the folder; None if
            there is nothing to run.

    Returns:
        A line for each file that could not be saved, or not read back.
    """
    step = incident["step"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What was found comes first: saving the state may fill the disk.
        _write_json(folder, incident)
        torch.save({**state, "incident": json_safe(incident)}, folder / "state.part")
        unsafe = unreadable_type(folder / "state.part")
        (folder / "state.part").rename(folder / "state.pt")
        if unsafe is None and command is not None:
            incident["next"] = command.replace("{folder}", shlex.quote(str(folder)))
            _write_json(folder, incident)
    except Exception as error:
        logger.exception("the incident could not be saved")
        return [
            f"step {step}: cannot be rerun later: its state could not be saved"
            f" ({type(error).__name__}: {error})"
        ]
    remarks = []
    advice = "There is no command for this: what failed is not in the model's passes."
    if incident["next"] is not None:
        advice = f"<code>{html.escape(incident['next'])}</code>"
        if PLACEHOLDER in incident["next"]:
            advice += f" ({MEANING})"
    if unsafe is not None:
        remarks = [
            f"step {step}: cannot be rerun later: its state holds a {unsafe}, and only tensors"
            " and plain values can be read back"
        ]
        advice = "The step cannot be run again: its state holds more than tensors and plain values."
    try:
        write_page(folder / "incident.html", incident, ring, advice=advice)
    except Exception as error:
        logger.exception("the page of the incident could not be written")
        remarks.append(
            f"step {step}: the page could not be written ({type(error).__name__}: {error})"
        )
    return remarks


def _write_json(folder: Path, incident: Mapping[str, Any]) -> None:
    text = json.dumps(json_safe(dict(incident)), indent=2, allow_nan=False)
    (folder / "incident.part").write_text(text + "\n", encoding="utf-8")
    (folder / "incident.part").rename(folder / "incident.json")


def lines_of(incident: Mapping[str, Any]) -> list[str]:
    """The lines that are printed: operation, source, cause, and the next command."""
    lines = [incident["line"]]
    source = incident["source"]
    if source is not None:
        code = " ".join(source["code"].split())
        lines.append(f"  at {source['file']}:{source['line']}: {code}")
    if incident["explanation"]:
        lines.append(f"  cause: {incident['cause']}. {incident['explanation']}")
    if incident["advice"]:
        lines.append(f"  what usually helps: {incident['advice']}")
    if incident["next"]:
        lines.append(f"  next: {incident['next']}")
        if PLACEHOLDER in incident["next"]:
            lines.append(f"    ({MEANING})")
    return lines


def largest_gradients(module: nn.Module) -> dict[str, float | None]:
    """The five parameters with the largest gradient norms; non-finite norms come first."""
    norms = {n: p.grad.norm().item() for n, p in module.named_parameters() if p.grad is not None}
    ranked = sorted(norms, key=lambda n: norms[n] if math.isfinite(norms[n]) else math.inf)
    return {name: norms[name] for name in ranked[::-1][:5]}


def weight_absmax(module: nn.Module) -> float:
    """The largest finite absolute value of all weights; 0 if there is none."""
    sizes = [parameter.detach().abs() for parameter in module.parameters()]
    largest = [torch.where(size.isfinite(), size, 0.0).max() for size in sizes if size.numel()]
    return max((value.item() for value in largest), default=0.0)


def second_moment_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all second moments of an Adam-like optimizer are finite."""
    moments = [s["exp_avg_sq"] for s in optimizer.state.values() if "exp_avg_sq" in s]
    return all(bool(moment.isfinite().all()) for moment in moments)
