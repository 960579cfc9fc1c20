"""`python -m nonfinite FOLDER --model package.module:callable`: runs a recorded step again."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from nonfinite.finding import is_alike, is_same
from nonfinite.forward_calls import ForwardCall, run_call
from nonfinite.rerun import undisturbed
from nonfinite.tracer import Tracer


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if the step was run, whatever came out, and 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m nonfinite", description=__doc__)
    parser.add_argument("folder", type=Path, help="such as incidents/step-7")
    parser.add_argument("--model", required=True, help="package.module:callable")
    given = parser.parse_args(argv)
    file = given.folder / "state.pt"
    if not file.is_file():
        parser.error(f"{given.folder}: holds no state.pt")
    try:
        # Only tensors and plain values are read, so the file cannot run code.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may fail in any way
        parser.error(f"{file}: is damaged, or holds more than tensors and plain values")
    if "calls" not in state:
        parser.error(f"{given.folder}: was not written by watch(); see src.diagnose and src.replay")
    module_name, _, name = given.model.partition(":")
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module_name), name)()
        # A compiled model's weights have a prefix.
        weights = {key.removeprefix("_orig_mod."): v for key, v in state["state_dict"].items()}
        model.load_state_dict(weights)
    except Exception as error:  # a user's code may fail in any way
        parser.error(f"--model={given.model}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if state["incident"]["next"] is None and state["incident"]["finding"] is None:
        parser.error(
            f"{given.folder}: what failed is not in the model's passes; read incident.html"
        )
    return _show(model, state)


def _show(model: torch.nn.Module, state: dict[str, Any]) -> int:
    recorded = state["incident"]["finding"]
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
    if is_alike(finding, recorded):
        same = "same operation, other numbers"
        if is_same(finding, recorded):
            same = "reproduced, bitwise"
    print(same)
    return 0


if __name__ == "__main__":
    sys.exit(main())
