"""Audits the model that a target builds or a checkpoint holds, or runs a saved witness again."""

import contextlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.auditing import Audit, audit
from nonfinite.auditing.reach import Reach
from nonfinite.auditing.saved_witness import read_witness, run_witness
from nonfinite.finding import as_recorded
from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import InputError
from src.common.random_streams import seed_global, stream_seed
from src.external.load_target import call, running
from src.postmortem.entries import content_of, entries_for
from src.postmortem.given import typed_dtypes
from src.postmortem.load import LossStep, read_state
from src.training.task import LanguageModelTask

ROWS, TIME = 2, 16
"""Shape of the random token ids that stand for a batch."""


class StepModule(nn.Module):
    """A training step as a module that takes a batch and returns its loss.

    Args:
        step: a module with a `training_step`.
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, batch: Any) -> Any:
        """What `training_step` returns: the loss, or a mapping with it."""
        step: Any = self.step
        found = step.training_step(batch, 0)
        return found["loss"] if isinstance(found, Mapping) else found


def own_path(path: str, model: nn.Module) -> str:
    """The path of a module or weight as the user's model has it, without the step around it."""
    for prefix in _around(model):
        if path == prefix or path.startswith(f"{prefix}."):
            return path[len(prefix) + 1 :]
    return path


def own_words(text: str, model: nn.Module) -> str:
    """A sentence with such paths in it."""
    for prefix in _around(model):
        text = re.sub(rf"(?<![\w.]){re.escape(prefix)}\.", "", text)
    return text


def _around(model: nn.Module) -> list[str]:
    """Paths of the modules that this project puts around a user's model, the longest first."""
    if not isinstance(model, StepModule):
        return []
    is_ours = isinstance(model.step, LossStep | LanguageModelTask)
    return ["step.model", "step"] if is_ours else ["step"]


def in_own_words(found: Audit, model: nn.Module) -> Audit:
    """The same answer with the paths of the user's model."""
    for site in found.sites:
        site.modules = [own_path(path, model) for path in site.modules]
        for witness in site.witnesses.values():
            witness.how = own_words(witness.how, model)
            path = own_path(witness.finding.module, model)
            witness.finding = replace(witness.finding, module=path)
    return found


def audit_target(given: Mapping[str, Any]) -> int:
    """Audits and prints the answer; returns the exit code.

    Raises:
        InputError: a field is invalid, or the model cannot be run.
    """
    model, inputs = _model_and_inputs(given)
    if given["witness"] is not None:
        return _run_again(model, given)
    dtypes = [getattr(torch, name) for name in typed_dtypes(given)]
    whose = _whose(given)
    try:
        with running(f"{whose}: cannot be audited"):
            found = audit(
                model,
                inputs,
                dtypes=dtypes,
                reach=Reach(weights=float(given["weights"]), inputs=float(given["inputs"])),
                seconds=float(given["seconds"]),
                folder=given_path(given, "folder"),
                allow=[str(text) for text in given["allow"]],
            )
    except InputError as error:
        if given["batch"] is not None:
            raise
        raise InputError(f"{error}; type batch=FILE with what the model takes") from error
    found = in_own_words(found, model)
    found.model = str(given["target"] or given["checkpoint"])
    _show(found, given)
    return 1 if found.found else 0


def _whose(given: Mapping[str, Any]) -> str:
    if given["target"] is not None:
        return f"target={given['target']}"
    return f"checkpoint={given['checkpoint']}"


def _show(found: Audit, given: Mapping[str, Any]) -> None:
    if given["format"] == "json":
        print(json.dumps(found.as_dict()))
        return
    terminal.say(str(found))
    first = found.places[0][0].best.file if found.found else None
    if first is not None:
        fields = ("target", "checkpoint", "batch")
        typed = " ".join(f"{name}={given[name]}" for name in fields if given[name] is not None)
        again = f"python -m src.audit {typed} witness={first}"
        terminal.say(f"\nrun the first witness again: {again}")


def _run_again(model: nn.Module, given: Mapping[str, Any]) -> int:
    """Runs a saved witness; returns 1 if it still fails."""
    file = given_path(given, "witness")
    try:
        saved = read_witness(file)
    except ValueError as error:
        raise InputError(f"witness={error}") from error
    try:
        # What the user's model prints must not mix with the answer.
        with contextlib.redirect_stdout(sys.stderr):
            again = run_witness(model, saved)
    except ValueError as error:
        raise InputError(
            f"witness={file}: {error}; type target=, checkpoint= and batch= as for the audit"
        ) from error
    if again.other_weights and not again.is_same:
        name = own_path(again.other_weights[0], model)
        more = f" and {len(again.other_weights) - 1} more" if len(again.other_weights) > 1 else ""
        raise InputError(
            f"witness={file}: {_whose(given)} has other weights than the audited model ({name}"
            f"{more}), so that its answer says nothing of this witness; call torch.manual_seed in"
            " the function that builds it, or type checkpoint=FILE"
        )
    finding = again.finding
    if finding is not None:
        finding = replace(finding, module=own_path(finding.module, model))
    if given["format"] == "json":
        recorded = None if finding is None else as_recorded(finding)
        shown = {"finite": finding is None, "same": again.is_same, "finding": recorded}
        print(json.dumps(shown))
    elif finding is None:
        terminal.say(f"all values are finite ({saved['dtype']}): the witness fails no longer")
    else:
        terminal.say(f"{own_words(saved['how'], model)} ({saved['dtype']}):\n{finding}")
        is_same = again.is_same
        terminal.say("the operation of the witness" if is_same else "another operation than before")
    return 0 if finding is None else 1


def _model_and_inputs(given: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The module to audit, and what it is called with."""
    target = None if given["target"] is None else str(given["target"])
    kwargs = None if given["kwargs"] is None else dict(given["kwargs"])
    batch = None if given["batch"] is None else given_path(given, "batch")
    if given["checkpoint"] is not None:
        place = given_path(given, "checkpoint")
        state = read_state(place, target=target, kwargs=kwargs, precision="32-true")
        if batch is None and not (state.is_run or state.is_incident):
            return _called(state.task.train(), None)
        return StepModule(state.task), (entries_for(state, batch)[0]["batch"],)
    # A witness holds the weights that it changes; the others must be drawn again as they were.
    seed_global(stream_seed(0, "audit"))
    model = call(str(target), kwargs or {}, field="target", vocab_size=None, max_seq_len=None)
    return _called(model.train(), batch)


def _called(model: nn.Module, batch: Path | None) -> tuple[nn.Module, Any]:
    """A user's model with a batch of a file, or with random token ids."""
    if isinstance(model, LossStep):
        model = model.model
    if batch is None:
        tokens = random_tokens(model)
        content: Any = (tokens[:, :-1], tokens[:, 1:])
    else:
        content = content_of(batch)
        if isinstance(content, Tensor) and _is_integer(content):
            # One tensor of consecutive tokens is inputs and targets.
            content = (content[:, :-1], content[:, 1:])
    if hasattr(model, "training_step"):
        return StepModule(model), (content,)
    is_pair = isinstance(content, tuple) and len(content) == 2
    if is_pair and all(_is_integer(part) for part in content):
        return StepModule(LossStep(model, z_loss_weight=0.0)), (content,)
    return model, content


def random_tokens(model: nn.Module) -> Tensor:
    """Token ids of the model's vocabulary, (ROWS, TIME + 1).

    Raises:
        InputError: the model has no table of tokens, so that its input is unknown.
    """
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        raise InputError("batch=null: the model has no nn.Embedding; type batch=FILE")
    generator = torch.Generator().manual_seed(0)
    # The first table is that of the tokens; ids below 3 are mostly padding and marks.
    least = min(3, tables[0] - 1)
    return torch.randint(least, tables[0], (ROWS, TIME + 1), generator=generator)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
