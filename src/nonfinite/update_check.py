"""Checks of an optimizer update: learning rate, applied gradients, resulting weights."""

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.finite_checks import all_finite, can_be_nonfinite

RATE = "learning rate not finite"
CHANGED = "gradient changed before the update"
UPDATE = "optimizer update"

EPSILONS = ("eps", "epsilon")
"""Names under which optimizers keep the number that they add to a divisor."""


@dataclass(frozen=True, kw_only=True)
class UpdateFault:
    """What went wrong in the update of a step whose gradient was finite."""

    cause: str
    operation: str
    """The optimizer, or what changed the gradient."""
    summary: str
    """A few words for the incident's line."""
    explanation: str
    parameter: str | None = None
    """The first parameter whose weight or gradient is not finite; None if the rate is at fault."""
    figures: Mapping[str, Any] = field(default_factory=dict)


class UpdateCheck:
    """Checks one optimizer's steps.

    Args:
        optimizer: the optimizer.
        names: the path of each parameter, by its `id`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self.optimizer, self.names = optimizer, names
        self._is_torchs = type(optimizer).__module__.startswith("torch.optim")
        self._seen: dict[int, int] = {}

    @property
    def name(self) -> str:
        """The optimizer's class."""
        return type(self.optimizer).__name__

    def rate_fault(self) -> UpdateFault | None:
        """A learning rate that is NaN or infinite; must be called before the update."""
        for number, group in enumerate(self.optimizer.param_groups):
            rate = group.get("lr")
            if rate is not None and not math.isfinite(float(rate)):
                return UpdateFault(
                    cause=RATE,
                    operation=f"{self.name}, learning rate of group {number}",
                    summary=f"the learning rate of {self.name} is {float(rate)}",
                    explanation=f"The learning rate of {self.name}'s group {number} is"
                    f" {float(rate)} before the update; loss and gradient are finite.",
                    figures={"lr": float(rate)},
                )
        return None

    def remember_gradients(self) -> None:
        """Records which gradients were measured, to notice a later change without reading them."""
        self._seen = {id(p): _version(p.grad) for p in self._parameters() if p.grad is not None}

    def gradients_changed(self) -> bool:
        """Whether a gradient differs from what `remember_gradients` saw, or was not seen by it."""
        return any(
            p.grad is not None and self._seen.get(id(p)) != _version(p.grad)
            for p in self._parameters()
        )

    def applied_fault(self, *, gradients: bool) -> UpdateFault | None:
        """A non-finite gradient or weight; must be called after the update.

        Args:
            gradients: whether the gradients may have become non-finite since they were found to be
                finite.
        """
        if gradients:
            held = [(p, p.grad) for p in self._parameters() if p.grad is not None]
            looked_at = [gradient for _, gradient in held if can_be_nonfinite(gradient)]
            # One look at all of them, because a look at each takes longer than the update.
            if not total_norm(looked_at).isfinite():
                for parameter, gradient in held:
                    if not all_finite([gradient]):
                        return self._changed(parameter)
        for group in self.optimizer.param_groups:
            dtypes = {parameter.dtype for parameter in group["params"]}
            epsilons = tuple(_epsilons(group).values())
            at_risk = {t for t in dtypes if not self._is_torchs or _divides_by_zero(epsilons, t)}
            for parameter in group["params"] if at_risk else ():
                if parameter.dtype in at_risk and not all_finite([parameter]):
                    return self._broken(group, parameter)
        return None

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _changed(self, parameter: nn.Parameter) -> UpdateFault:
        name = self.names.get(id(parameter), "a parameter")
        return UpdateFault(
            cause=CHANGED,
            operation=f"gradient clipping, or another change of the gradient of {name}",
            summary=f"the gradient of {name} was changed to a non-finite one before the update",
            explanation=f"The gradient of {name} was finite after the backward pass, and was not"
            f" when {self.name} applied it: clipping, or another change in between, made it so.",
            parameter=name,
        )

    def _broken(self, group: Mapping[str, Any], parameter: nn.Parameter) -> UpdateFault:
        name = self.names.get(id(parameter), "a parameter")
        dtype = str(parameter.dtype).removeprefix("torch.")
        figures = {"dtype": dtype, "lr": float(group.get("lr", math.nan))}
        figures |= _epsilons(group)
        why = "It is not one of torch's optimizers; look for a division by 0 in its step."
        eps = next(iter(_epsilons(group).values()), None)
        if eps is not None and _is_zero(eps, parameter.dtype):
            why = (
                f"Its eps {eps:.3g} is 0 in {dtype}, so it divides by 0 where its average of"
                " squared gradients is 0."
            )
        bad = int((~parameter.detach().isfinite()).sum())
        return UpdateFault(
            cause=UPDATE,
            operation=f"{self.name} step",
            summary=f"the update of {self.name} made {name} non-finite",
            explanation=f"The update of {self.name} made {bad} of {parameter.numel()} elements of"
            f" {name} non-finite from a finite gradient and rate. {why}",
            parameter=name,
            figures=figures,
        )


def _epsilons(group: Mapping[str, Any]) -> dict[str, float]:
    """The epsilons of a group, by name; some optimizers keep pairs or None under these names."""
    found = {name: group.get(name) for name in EPSILONS}
    return {name: float(eps) for name, eps in found.items() if isinstance(eps, int | float)}


@functools.cache
def _divides_by_zero(epsilons: tuple[float, ...], dtype: torch.dtype) -> bool:
    """Whether one of torch's optimizers could divide weights of a dtype by 0.

    It does only if its epsilon is 0 in the dtype of the weights. An update that overflows is
    noticed in the next step, by its loss. Other optimizers are always looked at.
    """
    return any(_is_zero(eps, dtype) for eps in epsilons)


@functools.cache
def _is_zero(eps: float, dtype: torch.dtype) -> bool:
    """Whether a number is 0 in a dtype."""
    return torch.tensor(eps, dtype=dtype).item() == 0.0


def _version(gradient: Tensor) -> int:
    return hash((id(gradient), gradient._version))


def names_of(module: nn.Module) -> dict[int, str]:
    """The path of each parameter of a module, by its `id`."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def gradient_norm(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """The norm of all gradients that optimizers will apply; a sparse one counts by its values."""
    gradients = [
        gradient.coalesce().values() if gradient.is_sparse else gradient
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (gradient := parameter.grad) is not None
    ]
    return float(total_norm(gradients))


def total_norm(tensors: list[Tensor]) -> Tensor:
    """What torch.nn.utils.get_total_norm returns, bit for bit.

    It is faster for tensors of one device and dtype: PyTorch's function groups them first, which
    takes as long as the norms of a small model.
    """
    if len({tensor.dtype for tensor in tensors}) == 1:
        # Tensors of several devices, or of another layout, cannot be stacked or have no such norm.
        with contextlib.suppress(RuntimeError):
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return torch.nn.utils.get_total_norm(tensors)
