"""Diagnoses one step: the first non-finite value, or the smallest headroom."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nonfinite.causes import ADVICE, Evidence, cause, describe, explanation
from nonfinite.finding import Finding, as_recorded, is_alike, is_same
from nonfinite.headroom import Headroom, headroom_of
from nonfinite.lightning.rerun_step import rerun_loss
from nonfinite.recording import weight_absmax
from nonfinite.rerun import router_stats_at
from src.checkpoint.validate import recorded_device
from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import InputError
from src.external.load_target import running
from src.postmortem.entries import entries_for
from src.postmortem.given import check_diagnose
from src.postmortem.load import SavedState, context_for, read_state
from src.postmortem.misfit import misfit

REFUSED = "batch: the model does not accept it"

NO_TRAINER = "is not attached to a `Trainer`"
"""Part of the error that a LightningModule without a trainer raises if its code needs one."""


def diagnose(given: Mapping[str, Any]) -> int:
    """Reruns the step and prints the finding or the headroom; returns the exit code.

    Raises:
        InputError: a field is invalid.
    """
    check_diagnose(given)
    top, kwargs, target = int(given["top"]), given["kwargs"], given["target"]
    state = read_state(
        given_path(given, "checkpoint"),
        target=None if target is None else str(target),
        kwargs=None if kwargs is None else dict(kwargs),
        precision=given["precision"],
    )
    entries = entries_for(state, _batch(given))
    if state.is_incident:
        torch.set_num_threads(state.saved["threads"])
        torch.set_float32_matmul_precision(state.saved["matmul_precision"])
    finding, headroom = _examine(state, entries)
    router = {}
    if finding is not None:
        router = router_stats_at(state.task, finding.module)
        finding = replace(finding, module=state.own_path(finding.module))
    answer = _answer(state, finding, router, headroom[:top])
    if given["format"] == "json":
        print(json.dumps(answer))
    else:
        _show(state, answer)
    return 0


def _batch(given: Mapping[str, Any]) -> Path | None:
    return None if given["batch"] is None else given_path(given, "batch")


def _examine(
    state: SavedState, entries: list[dict[str, Any]]
) -> tuple[Finding | None, list[Headroom]]:
    """The first batch's finding; if all batches are finite, the smallest headroom over them."""
    moments = state.second_moments()
    nearest: dict[tuple[str, str], Headroom] = {}
    whose = "checkpoint" if state.target is None else f"target={state.target}"
    for entry in entries:
        loss_of = rerun_loss(
            state.task, entry, lambda: context_for(state.precision), accumulate=len(entries)
        )
        try:
            with running(f"{whose}: the step cannot be run under the tracer"):
                finding, headroom = headroom_of(
                    state.task, _checked(loss_of, whose), moments, batch=entry["batch"]
                )
        except InputError as error:
            if not str(error).startswith(REFUSED):
                raise
            why = misfit(state.task, loss_of, entry["batch"], own_path=state.own_path)
            raise InputError(f"{error}{why}") from error
        if finding is not None:
            return finding, headroom
        for entry_headroom in headroom:
            key = entry_headroom.module, entry_headroom.quantity
            if key not in nearest or entry_headroom.doublings < nearest[key].doublings:
                nearest[key] = entry_headroom
    return None, sorted(nearest.values(), key=lambda headroom: headroom.doublings)


def _checked(loss_of: Callable[[], Tensor | None], whose: str) -> Callable[[], Tensor | None]:
    """Turns errors about the batch, the trainer or the loss into one-line InputErrors."""

    def checked_loss() -> Tensor | None:
        with running(REFUSED):
            try:
                loss = loss_of()
            except RuntimeError as error:
                if NO_TRAINER not in str(error):
                    raise
                raise InputError(
                    f"{whose}: its training_step needs a trainer, and there is none here"
                ) from error
        if loss is not None and (loss.dim() or not loss.requires_grad):
            raise InputError(
                f"{whose}: training_step returned a loss of shape {tuple(loss.shape)}"
                f" {'with' if loss.requires_grad else 'without'} a gradient; must be a scalar with"
                " a gradient"
            )
        return loss

    return checked_loss


def _answer(
    state: SavedState,
    finding: Finding | None,
    router: Mapping[str, float],
    nearest: list[Headroom],
) -> dict[str, Any]:
    evidence = Evidence(
        finding=finding,
        failed=finding is not None,
        router=router,
        second_moment_finite=all(bool(m.isfinite().all()) for m in state.second_moments()),
        weight_absmax=weight_absmax(state.task),
        last={},
    )
    name = None if finding is None else cause(evidence)
    return {
        "finite": finding is None,
        "line": "all values are finite" if finding is None else describe(finding, router, None),
        "source": None if finding is None else as_recorded(finding)["source"],
        "cause": name,
        "explanation": None if name is None else explanation(evidence, name),
        "advice": None if name is None else ADVICE.get(name),
        "finding": None if finding is None else as_recorded(finding),
        "recorded": state.saved["incident"]["line"] if state.is_incident else None,
        "reproduced": is_same(finding, state.recorded) if state.is_incident else None,
        "alike": is_alike(finding, state.recorded) if state.is_incident else None,
        "recorded_on": recorded_device(state.saved) if state.is_incident else None,
        "precision": state.precision,
        "nearest": [
            asdict(replace(headroom, module=state.own_path(headroom.module)))
            for headroom in nearest
        ],
    }


def _show(state: SavedState, answer: Mapping[str, Any]) -> None:
    if state.note is not None:
        terminal.warn(state.note)
    terminal.say(f"{answer['line']} ({answer['precision']})")
    if answer["reproduced"] is False:
        how = "differs from the record"
        if answer["alike"]:
            how = f"same operation, but other values than recorded on {answer['recorded_on']}"
        terminal.warn(f"{how}: {answer['recorded']}")
    if not answer["finite"]:
        source = answer["source"]
        if source is not None:
            code = " ".join(source["code"].split())
            terminal.say(f"at {source['file']}:{source['line']}: {code}")
        terminal.say(f"cause: {answer['cause']}. {answer['explanation']}")
        if answer["advice"] is not None:
            terminal.say(f"what usually helps: {answer['advice']}")
        return
    rows = [
        [
            m["module"] or "the top-level module",
            m["quantity"],
            f"{m['value']:.3g}",
            f"{m['limit']:.3g}",
            f"{m['doublings']:.0f}",
        ]
        for m in answer["nearest"]
    ]
    columns = ["module", "quantity", "value", "limit", "doublings left"]
    terminal.table("quantities closest to their limits", columns, rows)
