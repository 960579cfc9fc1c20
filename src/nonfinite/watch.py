"""`watch(model, optimizer)`: guards and explains the steps of any training loop."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonfinite.closing_line import to_stderr
from nonfinite.forward_calls import LossOf
from nonfinite.muting import is_muted
from nonfinite.watched_steps import ON_NONFINITE, Watch, is_watched_already


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    on_nonfinite: str = "skip",
    folder: str | Path = "incidents",
    loss_of: LossOf | None = None,
    say: Callable[[str], None] = to_stderr,
) -> Watch:
    """Watches every step: keeps non-finite gradients out of the weights, and explains the first.

    The loop stays as it is, and so do its numbers. Call it once for each model that is called on
    its own, such as generator and discriminator.

    Args:
        model: the module that the loop calls; the forward pass that is kept is `model(...)`.
        optimizer: the optimizer of its weights, or several. Not LBFGS, which computes the gradient
            several times a step. A skipped step leaves weights, optimizer state and buffers
            bitwise as they were, for every optimizer that leaves out parameters without a
            gradient, as all of torch's do.
        on_nonfinite: skip the step; raise FloatingPointError; stop: skip this and all later steps,
            and set `stopped`; warn: apply it.
        folder: the first non-finite step and the first spike are saved to <folder>/step-<n>/.
        loss_of: computes the loss from the model's output, so that the loss is examined too; it is
            called only after a failed step, when the loop's variables still hold its batch.
        say: shows one line. The last line, at `close()` or at the end of the process, counts the
            steps that were not finite, if there were any.

    Returns:
        A handle with `incidents`, `summary()`, `stopped` and `close()`; also a context manager.

    Raises:
        TypeError: model or optimizer is of another type.
        ValueError: on_nonfinite is not one of these, or the optimizer or model is not supported.
    """
    optimizers = _checked(model, optimizer, on_nonfinite, folder)
    for name, function in (("loss_of", loss_of), ("say", say)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: is a {type(function).__name__}; must be a function")
    if on_nonfinite == "raise" and is_muted():
        on_nonfinite = "skip"  # the module is only imported, and must be
    return Watch(
        model,
        optimizers,
        on_nonfinite=on_nonfinite,
        folder=Path(folder),
        loss_of=loss_of,
        say=say,
    )


def _checked(
    model: Any, optimizer: Any, on_nonfinite: Any, folder: Any
) -> list[torch.optim.Optimizer]:
    """The optimizers as a list; raises what `watch` documents."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: is a {type(model).__name__}; must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: is a torch.jit module, which no tracer can look into")
    optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    if not optimizers:
        raise ValueError("optimizer: is an empty list; must hold at least one optimizer")
    weights = {id(parameter) for parameter in model.parameters()}
    for entry in optimizers:
        if not isinstance(entry, torch.optim.Optimizer):
            raise TypeError(f"optimizer: is a {type(entry).__name__}; must be a torch optimizer")
        if isinstance(entry, torch.optim.LBFGS):
            raise ValueError(
                "optimizer: LBFGS computes the gradient several times a step; use trace() instead"
            )
        if not any(id(p) in weights for group in entry.param_groups for p in group["params"]):
            raise ValueError("optimizer: holds no weight of this model; watch each with its own")
        if is_watched_already(entry):
            raise ValueError(
                "optimizer: is watched already; for several models with one optimizer, watch a"
                " module that calls them all"
            )
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite={on_nonfinite}: must be one of {', '.join(ON_NONFINITE)}")
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder: is a {type(folder).__name__}; must be a path")
    kinds = {type(inner).__name__ for inner in model.modules()}
    if any(kind.startswith(("FSDP", "FullyShardedData")) for kind in kinds):
        raise ValueError("model: is sharded (FSDP), so no process can run a step again")
    return optimizers
