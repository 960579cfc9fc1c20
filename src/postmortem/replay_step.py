"""Replays the step of an incident, optionally with other configuration values."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from nonfinite.causes import describe
from nonfinite.config import GuardConfig
from nonfinite.finding import Finding, as_recorded, is_alike, is_same
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.rerun_step import autocast_for, rerun_loss
from nonfinite.rerun import router_stats_at
from nonfinite.tracer import trace
from src.checkpoint.rebuild import (
    empty_model,
    restore_parts,
    restore_recipe,
    weights_of,
    with_vocabulary_of,
)
from src.checkpoint.validate import (
    check_state,
    is_external,
    is_incident,
    is_run,
    recorded_device,
)
from src.common import terminal
from src.common.errors import InputError
from src.common.read_checkpoint import STATE, read_tensors
from src.training.task import LanguageModelTask

CHANGEABLE = ("model", "attention", "ffn", "recipe")
"""Sections of which a replay can change values."""
REPLAYABLE = {"z_loss_weight"}
"""Fields of the recipe that affect the loss of a step, and can be changed."""


def replay(incident: Path, changes: Mapping[str, Any], form: str) -> int:
    """Reruns the step, and prints whether it fails as recorded; returns the exit code.

    A step recorded on a GPU is rerun on a GPU if there is one, else on the CPU, which gives
    slightly different values.

    Args:
        incident: the folder that the recorder wrote.
        changes: values to change, nested like the configuration; empty to rerun the step unchanged.
        form: text or json.

    Raises:
        InputError: the folder holds no incident of a run, or a change is not allowed.
    """
    state = read_tensors(incident / STATE, field="incident")
    check_state(state, what=f"incident={incident}")
    if not (is_incident(state) and is_run(state)):
        raise InputError(f"incident={incident}: is not an incident of a run of src.train")
    device = _device_for(state)
    finding, router = _run(incident, state, changes, device)
    recorded = state["incident"]
    answer = {
        "recorded": recorded["line"],
        "now": "all values are finite" if finding is None else describe(finding, router, None),
        "reproduced": not changes and is_same(finding, recorded["finding"]),
        "alike": is_alike(finding, recorded["finding"]),
        "recorded_on": recorded_device(state),
        "run_on": device.type,
        "averted": finding is None and recorded["finding"] is not None,
        "finding": None if finding is None else as_recorded(finding),
    }
    if form == "json":
        print(json.dumps(answer))
        return 0
    terminal.say(f"recorded: {answer['recorded']}")
    terminal.say(f"now:      {answer['now']}")
    if answer["reproduced"]:
        same = "all values are finite again" if finding is None else "the same tensor, bitwise"
        terminal.say(f"reproduced: {same}")
    elif answer["averted"]:
        terminal.say("these values avert the failure" if changes else "the failure is gone")
    elif changes:
        terminal.say("the step fails with these values too")
    elif answer["alike"]:
        where = f"recorded on {answer['recorded_on']}, run on {answer['run_on']}"
        terminal.say(f"same operation, but other values: {where}")
    else:
        terminal.say("differs from the record")
    return 0


def _device_for(state: Mapping[str, Any]) -> torch.device:
    """cuda if the incident was recorded there and a GPU is available, else cpu."""
    is_there = torch.cuda.is_available()
    return torch.device("cuda" if recorded_device(state) == "cuda" and is_there else "cpu")


def _run(
    incident: Path, state: Mapping[str, Any], changes: Mapping[str, Any], device: torch.device
) -> tuple[Finding | None, dict[str, float]]:
    recipe_changes = set(changes.get("recipe") or {}) - REPLAYABLE
    if recipe_changes:
        field = sorted(recipe_changes)[0]
        raise InputError(
            f"with.recipe.{field}: cannot be changed in a replay; of recipe, only"
            f" {', '.join(sorted(REPLAYABLE))} can"
        )
    for section in changes:
        if section not in CHANGEABLE:
            raise InputError(f"with.{section}: must be below one of {', '.join(CHANGEABLE)}")
    if is_external(state):
        raise InputError(
            f"incident={incident}: its model is external; src.diagnose checkpoint={incident}"
            f" target={state['config']['model']['target']} runs it again"
        )
    try:
        parts = restore_parts(state["config"], changes)
        recipe = restore_recipe(state["config"], changes)
    except InputError as error:
        raise InputError(f"with.{error}") from error
    torch.set_num_threads(state["threads"])
    torch.set_float32_matmul_precision(state["matmul_precision"])
    weights = state["state_dict"]
    model = empty_model(with_vocabulary_of(parts, weights_of(state)))
    guard = StepGuard(
        GuardConfig(check=[], on_nonfinite="skip", max_consecutive=None, on_alarm="none"),
        max_steps=1,
        log_every=1,
    )
    task = LanguageModelTask(
        model=model,
        recipe=recipe,
        guard=guard,
        lr_factor=recipe.lr_factor,
        checkpoint_extras={},
    )
    try:
        task.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            "with: changes the shape of the model, so its weights do not fit"
        ) from error

    typed = (changes.get("ffn") or {}).get("router") or {}
    for path, values in state["router_values"].items():
        for field, value in values.items():
            if field not in typed:
                setattr(task.get_submodule(path), field, value)

    task.to(device)

    def precision() -> AbstractContextManager[Any]:
        return autocast_for(state["precision"], device.type)

    batches = state["batches"]
    for saved in batches:
        entry = {**saved, "batch": move_data_to_device(saved["batch"], device)}
        loss_of = rerun_loss(task, entry, precision, accumulate=len(batches))
        finding = trace(task, loss_of, batch=entry["batch"])
        if finding is not None:
            return finding, router_stats_at(task, finding.module)
    return None, {}
