"""Models and loops of a few lines that tests of `watch` share."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nonfinite import Watch


def unwatched(model: nn.Module, optimizer: Any) -> None:
    """Replaces `watch` in an unchanged script."""


@dataclass
class Ran:
    """What a script leaves: its handles, what it measured, and its state after each step."""

    handles: list[Watch | None]
    measured: list[Any]
    states: list[list[Any]]

    @property
    def handle(self) -> Watch:
        """The handle that saw a step that was not finite."""
        (found,) = [h for h in self.handles if h is not None and h.nonfinite_steps]
        return found


def state_of(*parts: Any) -> list[Any]:
    """A copy of weights, buffers and optimizer state; not of the rate, which is the schedule's."""
    states = [part.state_dict() for part in parts]
    return copy.deepcopy([state.get("state", state) for state in states])


def same(one: Any, other: Any) -> bool:
    """Bitwise equality at any depth; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or repr(one) == repr(other)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Divides(nn.Module):
    """Divides each row by its norm, which is 0 for a row of zeros."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) / x.norm(dim=1, keepdim=True)


THE_DIVISION = "return self.inner(x) / x.norm(dim=1, keepdim=True)"


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters() if p.requires_grad], lr=0.1)


def batch(number: int, *, at: int = 2, bad: Any = 0.0) -> torch.Tensor:
    """Eight rows, of which one holds `bad` in the batch with the number `at`."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    if number == at:
        x[3] = bad
    return x


def loop(model: nn.Module, *optimizers: Any, called: Any = None, at: int = 2, bad: Any = 0.0):
    """Four steps; returns the states before and after each."""
    states = [state_of(model, *optimizers)]
    call = model if called is None else called
    for number in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = call(batch(number, at=at, bad=bad))
        output.pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        states.append(state_of(model, *optimizers))
    return states


def cause_and_line(handle: Watch) -> tuple[str, str | None]:
    (incident,) = handle.incidents
    source = incident["source"]
    return incident["cause"], None if source is None else source["code"]


NAMED = ("division by zero", THE_DIVISION)
