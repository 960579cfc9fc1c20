"""A post-mortem of one step: what was not finite, or what came nearest to it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import terminal
from src.errors import InputError
from src.foreign import running
from src.given import choice, number
from src.run.suspect import Suspect, entries_for, read_suspect
from src.watch.again import AUTOCAST, autocast_for, loss_again, router_figures
from src.watch.causes import Evidence, cause, describe
from src.watch.incident import weight_absmax
from src.watch.margins import Margin, margins_of
from src.watch.trace import Finding, is_same


def diagnose(given: Mapping[str, Any]) -> int:
    """Runs the step and says what it found; returns the exit code.

    Raises:
        InputError: any field is bad.
    """
    choice(given, "format", ("text", "json"))
    choice(given, "precision", (None, *AUTOCAST))
    top = number(given, "top", int, least=1)
    kwargs, target = given["kwargs"], given["target"]
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs={kwargs}: must be {{name: value}}")
    suspect = read_suspect(
        Path(str(given["checkpoint"])),
        target=None if target is None else str(target),
        kwargs=None if kwargs is None else dict(kwargs),
    )
    batch = None if given["batch"] is None else Path(str(given["batch"]))
    entries = entries_for(suspect, batch)
    precision = given["precision"] or _precision_of(suspect)
    if "threads" in suspect.saved:
        torch.set_num_threads(suspect.saved["threads"])
        torch.set_float32_matmul_precision(suspect.saved["matmul_precision"])
    finding, margins = _examine(suspect, entries, precision)
    router = {} if finding is None else router_figures(suspect.task, finding.module)
    answer = _answer(suspect, finding, router, margins[:top], precision=precision)
    if given["format"] == "json":
        print(json.dumps(answer))
    else:
        _show(suspect, answer)
    return 0


def _precision_of(suspect: Suspect) -> str:
    """That of the incident or the run; of other states nobody knows it."""
    if suspect.is_incident:
        precision = str(suspect.saved["precision"])
    elif suspect.is_run:
        precision = str(suspect.saved["config"]["recipe"]["precision"])
    else:
        precision = "32-true"
    if precision not in AUTOCAST:
        raise InputError(
            f"precision=null: {precision}, in which the step was recorded, is none of"
            f" {', '.join(AUTOCAST)}; name one of them"
        )
    return precision


def _examine(
    suspect: Suspect, entries: list[dict[str, Any]], precision: str
) -> tuple[Finding | None, list[Margin]]:
    """The first batch that is not finite; of several that are, the narrowest margins."""
    moments = suspect.second_moments()
    nearest: dict[tuple[str, str], Margin] = {}
    whose = "checkpoint" if suspect.target is None else f"target={suspect.target}"
    for entry in entries:
        again = loss_again(
            suspect.task, entry, lambda: autocast_for(precision), accumulate=len(entries)
        )
        with running(f"{whose}: the step cannot be run under watch"):
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
            loss = again()
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
    *,
    precision: str,
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
        "precision": precision,
        "nearest": [margin.plain() for margin in nearest],
    }


def _show(suspect: Suspect, answer: Mapping[str, Any]) -> None:
    if suspect.note is not None:
        terminal.warn(suspect.note)
    terminal.say(f"{answer['line']} ({answer['precision']})")
    if answer["reproduced"] is False:
        terminal.warn(f"not as recorded: {answer['recorded']}")
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
