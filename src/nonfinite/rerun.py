"""Reruns a step with its original inputs, and restores the module's state afterwards."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from nonfinite.snapshot import Snapshot, host_states, set_host_states

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Dtype of autocast for each precision, by Lightning's names, in which a step can be rerun."""

LOGS = ("log", "log_dict")
"""Methods by which a LightningModule logs."""

Routers = list[tuple[str, Any]]
"""Path and module of each router."""


def rerun_loss(
    task: nn.Module,
    entry: Mapping[str, Any],
    precision: Callable[[], AbstractContextManager[Any]],
    *,
    accumulate: int,
) -> Callable[[], Tensor | None]:
    """Restores the state before a recorded batch; returns a function that reruns its forward pass.

    Args:
        task: has `training_step(batch, batch_idx)`, which returns the loss or a dict with it.
        entry: a batch and the state before it, as the recorder keeps them.
        precision: the context of the training step.
        accumulate: micro-batches of the step.

    Returns:
        A function that returns the loss divided by `accumulate`, or None if there is no loss.
    """
    torch.set_rng_state(entry["rng"])
    if "host_rng" in entry:
        set_host_states(entry["host_rng"])
    # A step recorded on a GPU may be rerun without one.
    if entry["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(entry["cuda_rng"])
    with torch.no_grad():
        for name, value in entry["router_state"].items():
            _tensor_at(task, name).copy_(value)

    def loss_of() -> Tensor | None:
        step = cast(Any, task).training_step
        # Lightning allows a training_step without batch_idx.
        given = (entry["batch"], entry["batch_idx"])[: len(inspect.signature(step).parameters)]
        with precision(), _muted(task):
            output = step(*given)
        loss: Tensor | None = output["loss"] if isinstance(output, dict) else output
        # Without accumulation there is no division, which the tracer would see as the model's.
        return loss if loss is None or accumulate == 1 else loss / accumulate

    return loss_of


@contextmanager
def _muted(task: nn.Module) -> Iterator[None]:
    """Inside, logging does nothing, because the original step has logged already."""
    modules = [m for m in task.modules() if isinstance(m, pl.LightningModule)]
    own = [{name: vars(m)[name] for name in LOGS if name in vars(m)} for m in modules]
    trainer = getattr(task, "_trainer", None)
    loggers = [] if trainer is None else trainer.loggers
    for module in modules:
        vars(module).update(dict.fromkeys(LOGS, _discard))
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


def _discard(*_: Any, **__: Any) -> None:
    """Replaces `log` and `log_dict`."""


def autocast_for(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context of a training step in a precision of AUTOCAST."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


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
        with torch.compiler.set_stance("force_eager"), watched():
            yield
    finally:
        set_host_states(host_rng)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)
        snapshot.restore()
        with torch.no_grad():
            for name, value in routers.items():
                _tensor_at(module, name).copy_(value)
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


def _tensor_at(task: nn.Module, name: str) -> Tensor:
    path, _, field = name.rpartition(".")
    return cast(Tensor, getattr(task.get_submodule(path), field))
