"""`python -m nonfinite FOLDER --model package.module:callable`: runs a recorded step again."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from nonfinite.finding import is_alike, is_same
from nonfinite.rerun import undisturbed
from nonfinite.tracer import Tracer
from nonfinite.watch import loaded, run_call


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
        build = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"--model={given.model}: {error}")
    model = build()
    model.load_state_dict(state["state_dict"])
    return _show(model, state)


def _show(model: torch.nn.Module, state: dict[str, Any]) -> int:
    recorded = state["incident"]["finding"]
    finding = None
    for saved in state["calls"]:
        with undisturbed(model):
            finding = run_call(model, Tracer(model), loaded(saved), loss_of=None)
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
