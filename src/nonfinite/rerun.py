"""Runs code on a module, and restores the module's state and all random state afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from nonfinite.snapshot import Snapshot, host_states, set_host_states

Routers = list[tuple[str, Any]]
"""Path and module of each router."""

_watched = ContextVar("watched", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """Inside, code must not fuse or split operations for speed: the tracer has to see them."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def is_watched() -> bool:
    """Whether the tracer needs to see every operation."""
    return _watched.get()


class ConsumedError(RuntimeError):
    """A rerun would have used up something that cannot be put back."""


class _Untouchable:
    """Stands for an iterator or a queue of a module during a rerun; using it ends the rerun."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        raise ConsumedError(object.__getattribute__(self, "_name"))

    def __iter__(self) -> Any:
        raise ConsumedError(object.__getattribute__(self, "_name"))

    __next__ = __iter__


def _is_consumable(value: Any) -> bool:
    """Whether reading from a value uses it up: an iterator, an open file, or a queue."""
    if isinstance(value, nn.Module | Tensor | type):
        return False
    is_queue = type(value).__module__.split(".")[0] in ("queue", "_queue", "multiprocessing")
    return hasattr(type(value), "__next__") or (is_queue and hasattr(value, "get"))


@contextmanager
def untouched_iterators(module: nn.Module) -> Iterator[None]:
    """Inside, using an iterator that a module holds raises `ConsumedError`."""
    hidden = []
    for path, inner in module.named_modules():
        for name, value in list(vars(inner).items()):
            if _is_consumable(value):
                hidden.append((inner, name, value))
                place = f"{path}.{name}" if path else f"self.{name}"
                vars(inner)[name] = _Untouchable(place)
    try:
        yield
    finally:
        for inner, name, value in hidden:
            vars(inner)[name] = value


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restores gradients, buffers, router biases, attributes and random state afterwards.

    `Snapshot` defines what is restored. Compiled code runs eagerly, so that operations are visible.
    """
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    routers = router_state(routers_of(module))
    snapshot = Snapshot(module)
    host_rng = host_states()
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    for parameter in module.parameters():
        parameter.grad = None
    try:
        with torch.compiler.set_stance("force_eager"), watched(), untouched_iterators(module):
            yield
    finally:
        set_host_states(host_rng)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)
        snapshot.restore()
        with torch.no_grad():
            for name, value in routers.items():
                tensor_at(module, name).copy_(value)
        for name, parameter in module.named_parameters():
            # A parameter that the step itself created had no gradient before.
            parameter.grad = gradients.get(name)


def routers_of(module: nn.Module) -> Routers:
    """All modules inside a module that have a method `router_stats`, by path."""
    return [(n, m) for n, m in module.named_modules() if hasattr(m, "router_stats")]


def router_state(routers: Routers) -> dict[str, Tensor]:
    """Copies of the routers' vectors, such as biases, which change after a forward pass."""
    state = {}
    for path, router in routers:
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            if tensor.dim() <= 1:
                state[f"{path}.{name}"] = tensor.detach().clone()
    return state


def router_stats_at(task: nn.Module, path: str) -> dict[str, float]:
    """The statistics of the router at a path; empty if that module is not a router."""
    return dict(next((r.router_stats() for p, r in routers_of(task) if p == path), {}))


def tensor_at(task: nn.Module, name: str) -> Tensor:
    path, _, field = name.rpartition(".")
    return cast(Tensor, getattr(task.get_submodule(path), field))
