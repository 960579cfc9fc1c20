"""What a trace finds: the operation that produced the first harmful non-finite value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonfinite.finite_checks import absmax, all_finite
from nonfinite.snapshot import digest_of
from nonfinite.source_lines import Source

MAX_POSITIONS = 10

NORM = "norm of the gradient of"
"""Prefix of a finding's operation if all gradient entries are finite but their norm is not."""

INPUT = "input of"
"""Prefix of a finding's operation if its input holds a NaN that no traced operation produced."""

LOSS = "loss"
"""A finding's operation if nothing but the loss is known to be non-finite."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The origin of the non-finite values that reached the loss or a gradient of a step."""

    phase: str
    """weights or batch (non-finite before anything ran), forward, loss, backward, or update."""
    module: str
    """Path of the module that ran the operation or owns the weight; "" is the model itself."""
    operation: str
    """Function or autograd node, name of a weight, or place in a batch."""
    inside: str | None = None
    """The operation inside a composite function or node, such as `div` in `normalize`."""
    source: Source | None = None
    """The user's line; in the backward pass, the line whose derivative is computed."""
    shape: list[int]
    """Shape of the non-finite tensor."""
    num_elements: int
    num_nonfinite: int
    positions: list[list[int]]
    """Indices of the first ten non-finite elements."""
    input_absmax: float | None
    """Largest absolute value of the inputs; None if unknown or not finite."""
    dtype: str
    """Dtype of the non-finite tensor, such as float32."""
    digest: str
    """SHA-256 of the tensor's bytes."""
    mechanism: str | None = None
    """How finite operands gave a non-finite value, such as `division by zero`; None if unknown."""
    detail: str | None = None
    """A sentence with the operand that did it; None if unknown."""

    @property
    def place(self) -> str:
        """The module and the operation, for a sentence."""
        name = self.operation if self.inside is None else f"{self.inside} in {self.operation}"
        return f"{self.module or 'the top-level module'}: {name}"

    def __str__(self) -> str:
        share = f"{self.num_nonfinite} of {self.num_elements}"
        if self.phase in ("batch", "weights"):
            where = self.operation if self.phase == "batch" else self.place
            return f"{where}: {share} elements were not finite before the step"
        if self.phase == "loss":
            return (
                f"the gradient that the loss sent to {self.operation} is not finite"
                f" ({share} elements)"
            )
        text = f"{self.place} ({self.phase}) produced {share} non-finite elements"
        if self.operation.startswith(INPUT):
            text = f"{self.place} holds {share} non-finite elements that no traced operation made"
        elif self.operation == LOSS:
            text = "the loss is not finite, because of an operation that the tracer cannot see"
        text += "" if self.detail is None else f"; {self.detail}"
        return text if self.source is None else f"{text}\n  at {self.source}"


def found(
    phase: str,
    module: str,
    operation: str,
    tensor: Tensor,
    *,
    input_absmax: float | None = None,
    **facts: Any,
) -> Finding:
    """A finding about a non-finite tensor.

    Args:
        facts: the finding's optional fields.
    """
    tensor = tensor.detach()
    bad = ~tensor.isfinite()
    return Finding(
        phase=phase,
        module=module,
        operation=operation,
        shape=list(tensor.shape),
        num_elements=tensor.numel(),
        num_nonfinite=int(bad.sum()),
        positions=bad.nonzero()[:MAX_POSITIONS].tolist(),
        input_absmax=input_absmax,
        dtype=str(tensor.dtype).removeprefix("torch."),
        digest=digest_of(tensor),
        **facts,
    )


def is_same(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether a rerun produced the recorded finding, bitwise.

    Args:
        finding: the rerun's finding; None if it was finite.
        recorded: the recorded finding's fields; None if the step was finite.
    """
    same = finding is None or recorded is None or finding.digest == recorded["digest"]
    return same and is_alike(finding, recorded)


def is_alike(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether module and operation are those of the recorded finding; values may differ."""
    if finding is None or recorded is None:
        return finding is None and recorded is None
    return (finding.module, finding.operation) == (recorded["module"], recorded["operation"])


def as_recorded(finding: Finding) -> dict[str, Any]:
    """The finding as plain values for a file."""
    source = None if finding.source is None else vars(finding.source)
    return {**vars(finding), "source": source}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The operation of a backward pass whose result exceeds its operands by the largest factor."""

    factor: float
    module: str
    operation: str
    source: Source | None


def norm_overflow(gradients: Sequence[tuple[str, Tensor]]) -> Finding | None:
    """The finding if the norm over all gradients, which are finite, is not; the largest is named.

    Args:
        gradients: paths of the parameters, and their gradients.
    """
    norm = torch.nn.utils.get_total_norm([gradient for _, gradient in gradients])
    if all_finite([norm]):
        return None
    name, largest = max(gradients, key=lambda entry: absmax([entry[1]]))
    module, _, field = name.rpartition(".")
    size = absmax([largest])
    return found("backward", module, f"{NORM} {field}", norm, input_absmax=size)
