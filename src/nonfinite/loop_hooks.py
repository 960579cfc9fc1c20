"""Hooks that copies of a model do not inherit, and which of several processes reports."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A method as a hook that does nothing in copies of the model, saved ones included."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        # Compiled code must call it as it is.
        self.in_compiled_code = torch._dynamo.disable(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.in_compiled_code(*args, **kwargs)
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _make_nothing, ()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a hook in a copy of a model."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


def is_ddp_module(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)


def is_one_of_several(model: nn.Module) -> bool:
    """Whether other processes or devices take part in each step."""
    return is_ddp_module(model) or _world_size() > 1


def _world_size() -> int:
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_there else 1


def writes_here(has_finding: bool, *, is_ddp: bool) -> bool:
    """Whether this process prints and saves.

    Under DDP that is the first process with a finding, otherwise the first process.
    """
    if _world_size() == 1:
        return True
    rank = torch.distributed.get_rank()
    if not is_ddp:
        return rank == 0
    answers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, has_finding)
    return rank == (answers.index(True) if True in answers else 0)
