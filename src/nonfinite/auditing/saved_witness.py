"""Witnesses as files, and the pass of a saved witness run again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nonfinite.auditing.audit_report import Witness
from nonfinite.auditing.audited_passes import Passes
from nonfinite.auditing.tried_changes import Try
from nonfinite.finding import Finding, as_recorded, is_alike


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What a witness does when it is run again."""

    finding: Finding | None
    """None if all values are finite."""
    is_same: bool
    """Whether the finding is the saved one."""
    other_weights: list[str]
    """Weights that the witness leaves alone, and that are not those of the audit. If there are any,
    finite values do not show that the code was mended."""


def save_witness(file: Path, witness: Witness, tried: Try, passes: Passes) -> None:
    """Writes the changed weights, hashes of the others, the inputs and what failed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    finding = as_recorded(witness.finding)
    source = finding["source"]
    finding["source"] = None if source is None else dict(source)
    torch.save(
        {
            "dtype": witness.dtype,
            "how": witness.how,
            "weights": tried.values,
            "digests": {n: d for n, d in passes.digests().items() if n not in tried.values},
            "inputs": _plain(tried.inputs),
            "finding": finding,
        },
        file,
    )


def read_witness(file: str | Path) -> dict[str, Any]:
    """Reads a saved witness; no code in the file is run.

    Raises:
        ValueError: the file is damaged, or no witness.
    """
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail in any way
        raise ValueError(f"{file}: is damaged, or no file of tensors") from error
    fields = {"dtype", "weights", "digests", "inputs", "finding"}
    if not isinstance(saved, dict) or not fields <= saved.keys():
        raise ValueError(f"{file}: is no witness of an audit")
    return saved


def run_witness(model: nn.Module, saved: dict[str, Any]) -> Rerun:
    """Runs a witness again.

    Args:
        model: the model as it was audited.
        saved: what `read_witness` returned.

    Raises:
        ValueError: the weights of the witness do not fit the model, or it refuses the inputs.
    """
    passes = Passes(model, getattr(torch, saved["dtype"]))
    unknown = [name for name in saved["weights"] if name not in passes.tensors]
    if unknown:
        raise ValueError(f"the witness changes {unknown[0]}, which the model does not have")
    try:
        finding = passes.traced(saved["weights"], saved["inputs"])
    except Exception as error:  # a user's model may fail in any way
        raise ValueError(f"the model cannot be run on the witness ({error})") from error
    known = saved["digests"]
    others = [name for name, found in passes.digests().items() if known.get(name, found) != found]
    return Rerun(
        finding=finding,
        is_same=is_alike(finding, saved["finding"]),
        other_weights=[name for name in others if name not in saved["weights"]],
    )


def _plain(inputs: Any) -> Any:
    """Inputs as a file keeps them: detached tensors in plain containers."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, inputs)
