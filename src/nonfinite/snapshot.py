"""Snapshots of everything but parameters: module state and random generators."""

import hashlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]

CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)
"""Containers whose content is restored; subclasses are not, because they may behave differently."""

TABLES = frozenset(vars(nn.Module()))
"""Attributes in which torch keeps a module's parameters, buffers, hooks and submodules."""


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes; equal for tensors that are bitwise equal."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    content = dense.resolve_conj().resolve_neg().contiguous().cpu().view(-1).view(torch.uint8)
    raw = content.numpy().tobytes() if np is not None else bytes(content.tolist())
    return hashlib.sha256(raw).hexdigest()


class Snapshot:
    """Buffers and attributes of a module and all its submodules at the time of construction.

    It keeps which object each attribute refers to, and the content of tensors, arrays, lists,
    dictionaries and sets at any depth. It does not keep parameters or the content of other objects,
    and does not remove attributes that are added later.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = {inner: dict(inner.__dict__) for inner in module.modules()}
        self._buffers = {inner: dict(inner._buffers.items()) for inner in module.modules()}
        # By identity, because several attributes may refer to one object.
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
        elif _is_array(value) and value.flags.writeable:
            self._refill.append(_refill_array(value))
        elif type(value) in CONTAINERS:
            self._refill.append(_refill_container(value))
        else:
            return
        self._known.add(id(value))
        if type(value) in CONTAINERS:
            for entry in list(value.values() if isinstance(value, dict) else value):
                self._keep(entry)

    def restore(self) -> None:
        """Restores attributes, buffers and contents."""
        for inner, attributes in self._attributes.items():
            # __dict__ also holds torch's own tables, which are still the same objects.
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
    # Copied as bytes, because entries of an expanded tensor may share memory.
    place = tensor.detach()
    content = _memory(tensor).clone()

    def refill() -> None:
        if tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape:
            tensor.data = place
        memory = _memory(place)
        # Unchanged memory is not written, because it may be read-only.
        if not torch.equal(memory, content):
            memory.copy_(content)

    return refill


def _is_array(value: Any) -> bool:
    return np is not None and isinstance(value, np.ndarray)


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


def _refill_array(array: Any) -> Callable[[], None]:
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
    """A module's state that is not in its `state_dict`, by path, in a comparable form."""
    return {
        f"{path}.{name}".lstrip("."): _comparable(value)
        for path, inner in module.named_modules()
        for name, value in _unsaved_of(inner)
    }


def _unsaved_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in sorted(module._non_persistent_buffers_set):
        yield name, module._buffers.get(name)
    for name, value in vars(module).items():
        if name not in TABLES:
            yield name, value


def _comparable(value: Any) -> Any:
    """A value that compares equal for equal inputs; None for types that are not compared."""
    if isinstance(value, nn.Parameter):
        return None
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), digest_of(value)
    if _is_array(value):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return tuple((_comparable(key), _comparable(entry)) for key, entry in value.items())
    if isinstance(value, tuple) or type(value) in (list, deque):
        return tuple(_comparable(entry) for entry in value)
    if type(value) is set:
        return frozenset(value)
    # As text, because NaN does not equal itself.
    return repr(value) if isinstance(value, bool | int | float | str) else None


def raw_host_states() -> Any:
    """States of Python's and NumPy's global generators, as they are."""
    return random.getstate(), None if np is None else np.random.get_state()


def same_host_states(states: Any) -> bool:
    """Whether both generators are as they were at `raw_host_states`."""
    python, numpy = raw_host_states()
    # NumPy's state holds an array of numbers and the place in it.
    same = numpy is None or (numpy[2] == states[1][2] and bool((numpy[1] == states[1][1]).all()))
    return python == states[0] and same


def set_raw_host_states(states: Any) -> None:
    """Restores both generators from `raw_host_states`."""
    random.setstate(states[0])
    if states[1] is not None:
        np.random.set_state(states[1])


def host_states() -> dict[str, Any]:
    """States of Python's and NumPy's global generators, as plain values that a file may hold."""
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(numbers), gauss]}
    if np is not None:
        state: Any = np.random.get_state()
        kind, keys, *rest = state
        states["numpy"] = [kind, keys.tolist(), *rest]
    return states


def set_host_states(states: Mapping[str, Any]) -> None:
    """Restores both generators from `host_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if np is not None and "numpy" in states:
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
