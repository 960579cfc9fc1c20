"""Runs the training step of a LightningModule again, with its original inputs."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from nonfinite.buffers import put_back
from nonfinite.rerun import tensor_at
from nonfinite.snapshot import set_host_states

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Dtype of autocast for each precision, by Lightning's names, in which a step can be rerun."""

LOGS = ("log", "log_dict")
"""Methods by which a LightningModule logs."""


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
    # Incidents of earlier versions do not hold buffers.
    put_back(task, entry.get("buffers", {}))
    with torch.no_grad():
        for name, value in entry["router_state"].items():
            tensor_at(task, name).copy_(value)

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
