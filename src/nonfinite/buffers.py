"""Copies of a module's buffers from before a step, to put them back if the step fails."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nonfinite.finite_checks import all_finite

Copies = Mapping[str, Tensor]
"""Copies of buffers by path."""


class BufferCopies:
    """Copies buffers only when they have changed.

    Those of a module are copied together. Vectors are always copied, because batch normalisation
    changes its statistics without counting a version.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = [(path, m) for path, m in root.named_modules() if m._buffers]
        self._known: dict[str, list[tuple[int, int]]] = {}
        self._copies: dict[str, Tensor] = {}

    def current(self) -> Copies:
        """Copies of all buffers as they are now; unchanged ones are shared with earlier calls."""
        changed = False
        copies = self._copies
        for path, module in self._modules:
            buffers = [(n, b) for n, b in module._buffers.items() if b is not None]
            versions = [(id(buffer), buffer._version) for _, buffer in buffers]
            if self._known.get(path) == versions and not any(_is_small(b) for _, b in buffers):
                continue
            if not changed:
                copies, changed = dict(copies), True
            self._known[path] = versions
            for name, buffer in buffers:
                copies[f"{path}.{name}" if path else name] = buffer.detach().clone()
        self._copies = copies
        return copies


def _is_small(buffer: Tensor) -> bool:
    return buffer.dim() == 1 and buffer.numel() <= 2**16


@torch.no_grad()
def put_back(root: nn.Module, copies: Copies, *, only_damaged: bool = False) -> list[str]:
    """Copies the values back; returns the buffers that were not finite although they had been.

    Args:
        root: the module that the copies were made of.
        copies: from `BufferCopies.current`.
        only_damaged: leaves buffers alone that are still finite.
    """
    damaged = []
    buffers = dict(root.named_buffers(remove_duplicate=False))
    for name, copy in copies.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != copy.shape:
            continue
        is_damaged = not all_finite([buffer]) and all_finite([copy])
        if is_damaged:
            damaged.append(name)
        if is_damaged or not only_damaged:
            buffer.copy_(copy)
    return damaged
