"""A step run again: with what it saw then, and without a trace left behind."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from nonfinite.random_state import host_states, set_host_states
from nonfinite.snapshot import Contents

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precisions, by Lightning's names, in which a step can be run again; products are in this type."""

LOGS = ("log", "log_dict")
"""Methods of a LightningModule by which figures leave its training step."""

Routers = list[tuple[str, Any]]
"""Path and module of what has a router's figures."""


def loss_again(
    task: nn.Module,
    entry: Mapping[str, Any],
    precision: Callable[[], AbstractContextManager[Any]],
    *,
    accumulate: int,
) -> Callable[[], Tensor | None]:
    """Puts back what a recorded batch saw; what is returned runs its forward pass again.

    Args:
        task: has `training_step(batch, batch_idx)`, which returns the loss or a dict with it.
        entry: the batch and the state around it, as the recorder keeps it.
        precision: the context of the training step.
        accumulate: micro-batches of the step.
    """
    torch.set_rng_state(entry["rng"])
    if "host_rng" in entry:
        set_host_states(entry["host_rng"])
    # What was recorded on a GPU may be looked at without one.
    if entry["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(entry["cuda_rng"])
    with torch.no_grad():
        for name, value in entry["router_state"].items():
            _tensor_at(task, name).copy_(value)

    def loss_of() -> Tensor | None:
        step = cast(Any, task).training_step
        # Lightning lets a training_step do without the index.
        given = (entry["batch"], entry["batch_idx"])[: len(inspect.signature(step).parameters)]
        with precision(), _muted(task):
            output = step(*given)
        loss: Tensor | None = output["loss"] if isinstance(output, dict) else output
        # A division of ours is no operation of the model's.
        return loss if loss is None or accumulate == 1 else loss / accumulate

    return loss_of


@contextmanager
def _muted(task: nn.Module) -> Iterator[None]:
    """Inside, what is logged goes nowhere: the step itself has logged it."""
    modules = [m for m in task.modules() if isinstance(m, pl.LightningModule)]
    own = [{name: vars(m)[name] for name in LOGS if name in vars(m)} for m in modules]
    trainer = getattr(task, "_trainer", None)
    loggers = [] if trainer is None else trainer.loggers
    for module in modules:
        vars(module).update(dict.fromkeys(LOGS, _nowhere))
    if trainer is not None:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for module, kept in zip(modules, own, strict=True):
            for name in LOGS:
                del vars(module)[name]
            vars(module).update(kept)


def _nowhere(*_: Any, **__: Any) -> None:
    """Takes what is logged."""


def autocast_for(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context of a training step in one of the precisions of AUTOCAST."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


_watched = ContextVar("watched", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """Inside, code that fuses or splits an operation to be fast does it in full, to be seen."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def is_watched() -> bool:
    """Whether every operation is being looked at."""
    return _watched.get()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts gradients, buffers, router biases, attributes and random state back afterwards.

    `Contents` says how deep. What is compiled runs as it is written: operations are to be seen.
    """
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    routers = router_state(routers_of(module))
    contents = Contents(module)
    host_rng = host_states()
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    for parameter in module.parameters():
        parameter.grad = None
    try:
        with torch.compiler.set_stance("force_eager"), watched():
            yield
    finally:
        set_host_states(host_rng)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)
        contents.put_back()
        with torch.no_grad():
            for name, value in routers.items():
                _tensor_at(module, name).copy_(value)
        for name, parameter in module.named_parameters():
            # One that the step has made has had none.
            parameter.grad = gradients.get(name)


def routers_of(module: nn.Module) -> Routers:
    """Everything inside a module that has a method `router_stats`."""
    return [(n, m) for n, m in module.named_modules() if hasattr(m, "router_stats")]


def router_state(routers: Routers) -> dict[str, Tensor]:
    """Copies of the small tensors of routers, which may change between forward and verdict."""
    state = {}
    for path, router in routers:
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            if tensor.dim() <= 1:
                state[f"{path}.{name}"] = tensor.detach().clone()
    return state


def router_figures(task: nn.Module, path: str) -> dict[str, float]:
    """The figures of a router by its path; nothing where the module is none."""
    return dict(next((r.router_stats() for p, r in routers_of(task) if p == path), {}))


def _tensor_at(task: nn.Module, name: str) -> Tensor:
    path, _, field = name.rpartition(".")
    return cast(Tensor, getattr(task.get_submodule(path), field))
