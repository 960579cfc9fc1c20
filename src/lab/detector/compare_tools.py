"""Runs a public case under four tools, with the same seeds and batches, and judges each.

What fails, and when, is found first (`first_failure`): the failing step is the first one whose loss
or gradient, or whose weights after it, are not finite. Of each tool its first report counts:

- **plain loop**: nothing but the loop, which prints its loss. A report is a loss that is not
  finite, or an exception that the loop raises by itself.
- **nonfinite**: `watch` in the plain loop, or the callbacks in Lightning, as the case says. A
  report is the first incident that is not a spike.
- **detect_anomaly**: the plain loop under `torch.autograd.set_detect_anomaly(True)`. A report is
  its RuntimeError. It names the function of the error, and the lines of the traceback of the
  forward call, which it gives as a warning.
- **DebugUnderflowOverflow**: the plain loop with this class of transformers on the model. A report
  is its ValueError. It names a module: that of the last frame it prints, or the module's parent if
  what is not finite is an input of the module, because the parent computed it. The model is called
  with keywords, as transformers' Trainer does, because the class raises an error of its own on
  boolean inputs that it sees; no input of a case is non-finite, so nothing is hidden from it.

The judgement asks four things:

- **detected**: `yes` at the failing step, `late` after it, `early` before it (a false alarm), `no`
  without a report.
- **place**: does the report name the faulty operation, or, for DebugUnderflowOverflow, the module
  whose forward computes it? The operation must be named on the guilty line: another `pow` of the
  same step is not the faulty one. A module is not asked for where the loss function or the
  optimizer fails, which belong to no module.
- **line**: is the guilty line among the lines it names, whichever operation on that line it names?
- **cause**: is its cause the right one, in the words of `nonfinite`?

Place, line and cause are `yes` only in a report of the failing step. They are `none` where a tool
never names such a thing, and `-` where there is no right answer.
"""

import contextlib
import inspect
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.debug_utils import DebugUnderflowOverflow

from src.lab.detector.public_cases.case_list import TOP, PublicCase
from src.lab.detector.public_cases.public_failure import Batch
from src.lab.detector.run_case import first_failure, incident_of, train_plainly

YES, NO, LATE, EARLY = "yes", "no", "late", "early"

NEVER_NAMED = "none"
"""The tool never names such a thing."""

NOT_ASKED = "-"
"""There is no right answer."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a tool says first; a field is empty if the tool does not name such a thing."""

    step: int
    named: str
    """What it names, for people to read."""
    operation: str = ""
    module: str = ""
    """Path of a module; empty for the model itself, too."""
    lines: tuple[str, ...] = ()
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a tool did on a case: the module's docstring says what each word means."""

    detected: str
    step: int | None
    named: str
    place: str
    line: str
    cause: str

    def columns(self, tool: str) -> dict[str, Any]:
        """The columns of public.csv."""
        return {f"{tool}_{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool, and what it names at all."""

    run: Callable[[PublicCase], Report | None]
    names_operation: bool = False
    names_module: bool = False
    names_line: bool = False
    names_cause: bool = False


def plain_loop(case: PublicCase) -> Report | None:
    """Looks at nothing but the loss."""
    model, optimizer = case.build()
    step = 0
    try:
        for step, loss_is_finite in train_plainly(case, model, optimizer):
            if not loss_is_finite:
                return Report(step=step, named="loss")
    # Whatever torch raises on the way counts as noticed. It is raised in the step after the last
    # one that was yielded, here and below.
    except Exception as error:
        return Report(step=step + 1, named=type(error).__name__)
    return None


def nonfinite(case: PublicCase) -> Report | None:
    """The first incident."""
    with tempfile.TemporaryDirectory() as folder:
        incident = incident_of(case, Path(folder))
    if incident is None:
        return None
    finding = incident["finding"] or {}
    operation = finding.get("operation") or ""
    code = (incident.get("source") or {}).get("code")
    return Report(
        step=incident["step"],
        named=" ".join(filter(None, (operation, finding.get("phase")))),
        operation=operation,
        lines=(code,) if code else (),
        cause=incident["cause"],
    )


def detect_anomaly(case: PublicCase) -> Report | None:
    """The error of autograd's anomaly mode, and the traceback in its warning."""
    model, optimizer = case.build()
    file = inspect.getfile(case.model)
    step = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                for step, _ in train_plainly(case, model, optimizer):  # noqa: B007
                    pass
        except Exception as error:
            raised = re.search(r"Function '(\w+)' returned nan values", str(error))
            # Any other error is the loop's own, which ends there without this tool, too.
            if raised is None:
                return None
        else:
            return None
    text = "\n".join(str(warning.message) for warning in caught)
    frames = re.findall(r'File "([^"]+)", line \d+, in .*\n\s+(.*)', text)
    return Report(
        step=step + 1,
        named=raised[1],
        operation=raised[1],
        lines=tuple(code for name, code in frames if name == file),
    )


def underflow_overflow(case: PublicCase) -> Report | None:
    """The error of transformers' DebugUnderflowOverflow, and the last frame that it prints."""
    model, optimizer = case.build()
    names = list(inspect.signature(model.forward).parameters)

    def call(model: nn.Module, inputs: Batch) -> Any:
        return model(**dict(zip(names, inputs, strict=True)))

    said = io.StringIO()
    step = 0
    with contextlib.redirect_stdout(said):
        DebugUnderflowOverflow(model)
        try:
            for step, _ in train_plainly(case, model, optimizer, call):  # noqa: B007
                pass
        except Exception as error:
            if "DebugUnderflowOverflow: inf/nan detected" not in str(error):
                return None
        else:
            return None
    # It says which tensors of the last module are bad, and then prints the last frames.
    tensors = re.findall(r"^(.+) has (?:nans|infs)$", said.getvalue(), re.M)
    path, kind = re.findall(r"^ {18}(\S*) (\w+)$", said.getvalue(), re.M)[-1]
    is_input = tensors[0].startswith("input")
    return Report(
        step=step + 1,
        named=f"{path or 'model'} ({kind}): {', '.join(dict.fromkeys(tensors))}",
        module=path.rpartition(".")[0] if is_input else path,
    )


TOOLS = {
    "plain_loop": Tool(run=plain_loop),
    "nonfinite": Tool(run=nonfinite, names_operation=True, names_line=True, names_cause=True),
    "detect_anomaly": Tool(run=detect_anomaly, names_operation=True, names_line=True),
    "underflow_overflow": Tool(run=underflow_overflow, names_module=True),
}
"""All tools by the beginning of their columns in public.csv."""


def plain_name(operation: str) -> str:
    """An operation's name without its package and autograd's suffix, in lower case."""
    name = re.sub(r"Backward\d*$", "", operation.rpartition(".")[2])
    return name.replace("_", "").lower()


def judge_report(
    case: PublicCase, tool: Tool, report: Report | None, *, failing_step: int
) -> Judgement:
    """Judges what a tool said of a case."""
    if report is None:
        detected = NO
    elif report.step == failing_step:
        detected = YES
    else:
        detected = LATE if report.step > failing_step else EARLY

    def mark(is_named: bool, expected: str | None, is_right: Callable[[Report], bool]) -> str:
        if not is_named:
            return NEVER_NAMED
        if expected is None:
            return NOT_ASKED
        return YES if report is not None and detected == YES and is_right(report) else NO

    def has_line(said: Report) -> bool:
        return any(re.search(case.line or "", code) for code in said.lines)

    def has_operation(said: Report) -> bool:
        is_same = re.fullmatch(case.operation or "", plain_name(said.operation)) is not None
        return is_same and has_line(said)

    def has_module(said: Report) -> bool:
        return re.fullmatch(case.module or TOP, said.module) is not None

    if tool.names_module:
        asked = None if case.operation is None else case.module
        place = mark(True, asked, has_module)
    else:
        place = mark(tool.names_operation, case.operation, has_operation)
    return Judgement(
        detected=detected,
        step=None if report is None else report.step,
        named="" if report is None else report.named,
        place=place,
        line=mark(tool.names_line, case.line, has_line),
        cause=mark(
            tool.names_cause, case.cause, lambda s: re.search(case.cause, s.cause) is not None
        ),
    )


def compare_tools(case: PublicCase) -> dict[str, Any]:
    """Runs a case under all tools; returns its row of public.csv."""
    failure = first_failure(case)
    assert failure is not None, f"{case.name} does not fail"
    step, what = failure
    row: dict[str, Any] = {
        "case": case.name,
        "kind": case.kind,
        "source": case.model.source,
        "loop": case.loop,
        "failing_step": step,
        "first_bad": what,
        "expected_line": case.line,
        "expected_operation": case.operation,
        "expected_module": "model" if case.module == TOP else case.module,
        "expected_cause": case.cause,
    }
    for name, tool in TOOLS.items():
        judgement = judge_report(case, tool, tool.run(case), failing_step=step)
        row |= judgement.columns(name)
    return row
