"""A post-mortem of one step: what was not finite, or what came nearest to it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nonfinite.causes import Evidence, cause, describe
from nonfinite.headroom import Margin, margins_of
from nonfinite.recorder import weight_absmax
from nonfinite.rerun import loss_again, router_figures
from nonfinite.tracer import Finding, is_alike, is_same
from src.checkpoint.validate import recorded_device
from src.cli.field_checks import choice, given_path, number
from src.common import terminal
from src.common.errors import InputError
from src.external.load_target import running
from src.postmortem.load import Suspect, entries_for, read_suspect
from src.postmortem.precision import PRECISIONS, context_for

NO_TRAINER = "is not attached to a `Trainer`"
"""In what a LightningModule raises that is asked for its trainer, or for what the trainer holds."""


def diagnose(given: Mapping[str, Any]) -> int:
    """Runs the step and says what it found; returns the exit code.

    Raises:
        InputError: any field is bad.
    """
    choice(given, "format", ("text", "json"))
    choice(given, "precision", (None, *PRECISIONS))
    top = number(given, "top", int, least=1)
    kwargs, target = given["kwargs"], given["target"]
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs={kwargs}: must be {{name: value}}")
    if kwargs is not None and not all(isinstance(name, str) for name in kwargs):
        raise InputError(f"kwargs={kwargs}: names must be text")
    suspect = read_suspect(
        given_path(given, "checkpoint"),
        target=None if target is None else str(target),
        kwargs=None if kwargs is None else dict(kwargs),
        precision=given["precision"],
    )
    entries = entries_for(suspect, _batch(given))
    if suspect.is_incident:
        torch.set_num_threads(suspect.saved["threads"])
        torch.set_float32_matmul_precision(suspect.saved["matmul_precision"])
    finding, margins = _examine(suspect, entries)
    router = {} if finding is None else router_figures(suspect.task, finding.module)
    answer = _answer(suspect, finding, router, margins[:top])
    if given["format"] == "json":
        print(json.dumps(answer))
    else:
        _show(suspect, answer)
    return 0


def _batch(given: Mapping[str, Any]) -> Path | None:
    return None if given["batch"] is None else given_path(given, "batch")


def _examine(
    suspect: Suspect, entries: list[dict[str, Any]]
) -> tuple[Finding | None, list[Margin]]:
    """The first batch that is not finite; of several that are, the narrowest margins."""
    moments = suspect.second_moments()
    nearest: dict[tuple[str, str], Margin] = {}
    whose = "checkpoint" if suspect.target is None else f"target={suspect.target}"
    for entry in entries:
        with running(f"{whose}: the step cannot be run under watch"):
            again = loss_again(
                suspect.task,
                entry,
                lambda: context_for(suspect.precision),
                accumulate=len(entries),
            )
            finding, margins = margins_of(
                suspect.task, _checked(again, whose), moments, batch=entry["batch"]
            )
        if finding is not None:
            return finding, margins
        for margin in margins:
            key = margin.module, margin.quantity
            if key not in nearest or margin.doublings < nearest[key].doublings:
                nearest[key] = margin
    return None, sorted(nearest.values(), key=lambda margin: margin.doublings)


def _checked(again: Callable[[], Tensor | None], whose: str) -> Callable[[], Tensor | None]:
    """The same, with one line for a step that does not take the batch or gives no loss."""

    def loss_of() -> Tensor | None:
        with running("batch: the model does not take it"):
            try:
                loss = again()
            except RuntimeError as error:
                if NO_TRAINER not in str(error):
                    raise
                raise InputError(
                    f"{whose}: its training_step asks for its trainer, and is run without one here"
                ) from error
        if loss is not None and (loss.dim() or not loss.requires_grad):
            raise InputError(
                f"{whose}: training_step gives a loss of shape {tuple(loss.shape)}"
                f" {'with' if loss.requires_grad else 'without'} a gradient, must be one number"
                " with one"
            )
        return loss

    return loss_of


def _answer(
    suspect: Suspect,
    finding: Finding | None,
    router: Mapping[str, float],
    nearest: list[Margin],
) -> dict[str, Any]:
    evidence = Evidence(
        finding=finding,
        loss_finite=finding is None,
        router=router,
        second_moment_finite=all(bool(m.isfinite().all()) for m in suspect.second_moments()),
        weight_absmax=weight_absmax(suspect.task),
        last={},
    )
    return {
        "finite": finding is None,
        "line": "all is finite" if finding is None else describe(finding, router, None),
        "cause": None if finding is None else cause(evidence),
        "finding": None if finding is None else finding.plain(),
        "recorded": suspect.saved["incident"]["line"] if suspect.is_incident else None,
        "reproduced": is_same(finding, suspect.recorded) if suspect.is_incident else None,
        "alike": is_alike(finding, suspect.recorded) if suspect.is_incident else None,
        "recorded_on": recorded_device(suspect.saved) if suspect.is_incident else None,
        "precision": suspect.precision,
        "nearest": [margin.plain() for margin in nearest],
    }


def _show(suspect: Suspect, answer: Mapping[str, Any]) -> None:
    if suspect.note is not None:
        terminal.warn(suspect.note)
    terminal.say(f"{answer['line']} ({answer['precision']})")
    if answer["reproduced"] is False:
        how = "not as recorded"
        if answer["alike"]:
            how = f"the same operation on other numbers than on {answer['recorded_on']}"
        terminal.warn(f"{how}: {answer['recorded']}")
    if not answer["finite"]:
        terminal.say(f"cause: {answer['cause']}")
        return
    rows = [
        [
            m["module"] or "the model itself",
            m["quantity"],
            f"{m['value']:.3g}",
            f"{m['limit']:.3g}",
            f"{m['doublings']:.0f}",
        ]
        for m in answer["nearest"]
    ]
    columns = ["module", "quantity", "value", "limit", "doublings left"]
    terminal.table("nearest to their limits", columns, rows)
