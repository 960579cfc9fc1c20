"""`python -m nonfinite FOLDER --model package.module:callable`: runs a recorded step again.

FOLDER is what `watch` printed, such as incidents/step-7. The callable takes no arguments and
returns the model: a class, or a function. Its module is imported from the current folder, or from
an installed package.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from nonfinite.builders import BuilderError, check_form, find, missing_arguments
from nonfinite.closing_line import to_stderr
from nonfinite.finding import is_alike, is_same
from nonfinite.forward_calls import ForwardCall, run_call
from nonfinite.muting import muted
from nonfinite.rerun import undisturbed
from nonfinite.tracer import Tracer


class _OneLineParser(argparse.ArgumentParser):
    """Answers a mistake by one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if the step was run, whatever came out, and 2 for bad input."""
    parser = _OneLineParser(
        prog="python -m nonfinite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="such as incidents/step-7")
    parser.add_argument("--model", required=True, help="package.module:callable, as in train:Net")
    given = parser.parse_args(argv)
    try:
        check_form(given.model)
    except BuilderError as error:
        parser.error(f"--model={given.model}: {error}")
    # The incident is read before the module is imported, which may run anything.
    state = _read(given.folder, parser.error)
    try:
        model = _built(given.model)
        # A compiled model's weights have a prefix.
        weights = {key.removeprefix("_orig_mod."): v for key, v in state["state_dict"].items()}
        _load(model, weights, given.model)
    except BuilderError as error:
        parser.error(f"--model={given.model}: {error}")
    with muted():
        return _show(model, state)


def _read(folder: Path, refuse: Callable[[str], Any]) -> dict[str, Any]:
    """The saved state of an incident."""
    file = folder / "state.pt"
    if not file.is_file():
        inner = sorted(path.parent for path in folder.glob("*/state.pt"))
        listed = f"; it has {', '.join(map(str, inner))}" if inner else ""
        refuse(f"{folder}: holds no state.pt{listed}")
    try:
        # Only tensors and plain values are read, so the file cannot run code.
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may fail in any way
        refuse(f"{file}: is damaged, or holds more than tensors and plain values")
    if "calls" not in state:
        refuse(f"{folder}: was not written by watch(); see src.diagnose and src.replay")
    if state["incident"]["next"] is None and state["incident"]["finding"] is None:
        refuse(f"{folder}: what failed is not in the model's passes; read incident.html")
    return state


def _built(name: str) -> nn.Module:
    """The model that a callable returns; what the user's code prints goes to standard error."""
    sys.path.insert(0, "")
    module = name.partition(":")[0]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            with muted(lambda line: to_stderr(f"note: {line}"), module=module):
                build = find(name)
            needed = missing_arguments(build, ())
            if needed:
                raise BuilderError(
                    f"needs {' and '.join(needed)}; name a function without arguments that returns"
                    f" the model, such as {module}:build"
                )
            with muted():
                model = build()
    except BuilderError:
        raise
    # A user's code may fail in any way, and may call sys.exit.
    except (Exception, SystemExit) as error:
        first = str(error).strip().partition("\n")[0]
        raise BuilderError(f"{type(error).__name__}: {first}") from error
    if not isinstance(model, nn.Module):
        raise BuilderError(f"returned a {type(model).__name__}; must return the model")
    return model


def _load(model: nn.Module, weights: dict[str, Any], name: str) -> None:
    try:
        model.load_state_dict(weights)
    except Exception as error:  # the hooks of a user's model may fail in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BuilderError(
            f"the weights of the incident do not fit ({lines[1 if len(lines) > 1 else 0]}); name a"
            " function without arguments that returns the model as it was trained, such as"
            f" {name.partition(':')[0]}:build"
        ) from error


def _show(model: nn.Module, state: dict[str, Any]) -> int:
    incident = state["incident"]
    finding = None
    calls = [ForwardCall.loaded(saved) for saved in state["calls"]]
    for call in calls:
        with undisturbed(model):
            finding = run_call(
                model, Tracer(model), call, all_were_finite=all(c.was_finite for c in calls)
            )
        if finding is not None:
            break
    print("all values are finite" if finding is None else finding)
    same = "differs from the record"
    if is_alike(finding, incident["finding"]):
        print(f"cause: {incident['cause']}. {incident['explanation']}")
        same = "same operation, other numbers"
        if is_same(finding, incident["finding"]):
            same = "reproduced, bitwise"
    print(same)
    return 0


if __name__ == "__main__":
    sys.exit(main())
