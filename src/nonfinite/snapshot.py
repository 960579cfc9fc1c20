"""What modules hold beside their parameters: kept, put back, and compared."""

import hashlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)
"""What is put back with its content; a class of somebody's that is derived from one may differ."""

TABLES = frozenset(vars(nn.Module()))
"""Attributes that torch itself keeps in a module: parameters, buffers, hooks, modules."""


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes: equal where it is bitwise the same."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    content = dense.resolve_conj().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


class Contents:
    """Buffers and attributes of a module and of all inside it, as they are now.

    Kept are which object stands under a name, and what is in it: tensors, arrays, lists,
    dictionaries and sets, at any depth. What is in objects of other classes is not. Parameters
    are left out, and what a module makes anew stays.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = {inner: dict(inner.__dict__) for inner in module.modules()}
        self._buffers = {inner: dict(inner._buffers.items()) for inner in module.modules()}
        # By identity: one thing may stand in many places.
        self._known: set[int] = set()
        self._refill: list[Callable[[], None]] = []
        for inner, attributes in self._attributes.items():
            self._keep(list(self._buffers[inner].values()))
            self._keep([value for name, value in attributes.items() if name not in TABLES])

    def _keep(self, value: Any) -> None:
        if isinstance(value, tuple):
            for entry in value:
                self._keep(entry)
        if id(value) in self._known or isinstance(value, nn.Parameter) or is_lazy(value):
            return
        if isinstance(value, Tensor):
            self._refill.append(_refill_tensor(value))
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self._refill.append(_refill_array(value))
        elif type(value) in CONTAINERS:
            self._refill.append(_refill_container(value))
        else:
            return
        self._known.add(id(value))
        if type(value) in CONTAINERS:
            for entry in list(value.values() if isinstance(value, dict) else value):
                self._keep(entry)

    def put_back(self) -> None:
        """Makes everything what it was."""
        for inner, attributes in self._attributes.items():
            # Hooks and tables of parameters live there too, and are the same objects still.
            inner.__dict__.update(attributes)
            for name, buffer in self._buffers[inner].items():
                if inner._buffers[name] is not buffer:
                    inner._buffers[name] = buffer
        with torch.no_grad():
            for refill in self._refill:
                refill()


def _refill_tensor(tensor: Tensor) -> Callable[[], None]:
    if tensor.layout != torch.strided or type(tensor) is not Tensor:
        return partial(_copy, tensor, tensor.detach().clone())
    # As bytes: several of its entries may be one place in memory.
    place = tensor.detach()
    content = _memory(tensor).clone()

    def refill() -> None:
        if tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape:
            tensor.data = place
        memory = _memory(place)
        # Memory that nobody may write to has not changed.
        if not torch.equal(memory, content):
            memory.copy_(content)

    return refill


def _copy(tensor: Tensor, content: Tensor) -> None:
    tensor.copy_(content)


def _memory(tensor: Tensor) -> Tensor:
    """The bytes from a tensor's first entry to its last."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size, first = tensor.element_size(), tensor.storage_offset()
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage())[first * size : (first + last + 1) * size]


def _refill_array(array: np.ndarray) -> Callable[[], None]:
    content = array.copy()

    def refill() -> None:
        array[...] = content

    return refill


def _refill_container(container: Any) -> Callable[[], None]:
    content = container.copy()

    def refill() -> None:
        container.clear()
        if isinstance(container, list | deque):
            container.extend(content)
        else:
            container.update(content)

    return refill


def unsaved(module: nn.Module) -> dict[str, Any]:
    """What a module holds that is in no `state_dict`, by path, in a form that can be compared."""
    return {
        f"{path}.{name}".lstrip("."): _frozen(value)
        for path, inner in module.named_modules()
        for name, value in _unsaved_of(inner)
    }


def _unsaved_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in sorted(module._non_persistent_buffers_set):
        yield name, module._buffers.get(name)
    for name, value in vars(module).items():
        if name not in TABLES:
            yield name, value


def _frozen(value: Any) -> Any:
    """Equal where two values are; None for what is not looked at."""
    if isinstance(value, nn.Parameter):
        return None
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), digest_of(value)
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return tuple((_frozen(key), _frozen(entry)) for key, entry in value.items())
    if isinstance(value, tuple) or type(value) in (list, deque):
        return tuple(_frozen(entry) for entry in value)
    if type(value) is set:
        return frozenset(value)
    # Their words are equal where NaN is not.
    return repr(value) if isinstance(value, bool | int | float | str) else None
