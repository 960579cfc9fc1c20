"""A step run again: with what it saw then, and without a trace left behind."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precisions, by Lightning's names, in which a step can be run again; products are in this type."""

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
        with precision():
            output = step(*given)
        loss: Tensor | None = output["loss"] if isinstance(output, dict) else output
        # A division of ours is no operation of the model's.
        return loss if loss is None or accumulate == 1 else loss / accumulate

    return loss_of


def autocast_for(precision: str) -> AbstractContextManager[Any]:
    """The context of a training step on the CPU in one of the precisions of AUTOCAST."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts gradients, buffers, router biases, attributes and random state back afterwards."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    routers = router_state(routers_of(module))
    attributes = {inner: dict(inner.__dict__) for inner in module.modules()}
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    for parameter in module.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)
        for inner, values in attributes.items():
            # Hooks and tables of parameters live there too, and are the same objects still.
            inner.__dict__.update(values)
        with torch.no_grad():
            for name, value in {**buffers, **routers}.items():
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
