"""Names of the torch functions that the user's code calls, which operations below do not know."""

from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode, resolve_name


class FunctionWatcher(Protocol):
    """Is called around each torch function."""

    def before_function(self, func: Any, args: Any, kwargs: Any) -> None: ...

    def after_function(self, func: Any, args: Any, kwargs: Any, result: Any) -> None: ...


class FunctionNames(TorchFunctionMode):
    """Keeps the name of the outermost torch function that the user's code is calling."""

    def __init__(self, watcher: "FunctionWatcher") -> None:
        super().__init__()
        self.watcher = watcher
        self.running: list[str] = []

    def runs(self, *names: str) -> bool:
        """Whether the function is one of these, given without its module."""
        return bool(self.running) and self.running[-1].rpartition(".")[2] in names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        kwargs = kwargs or {}
        self.running.append(name)
        try:
            with torch._C._DisableTorchDispatch():
                self.watcher.before_function(func, args, kwargs)
            result = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():
                self.watcher.after_function(func, args, kwargs, result)
        finally:
            self.running.pop()
        return result


def running_derivative() -> str | None:
    """The node that is computing a derivative; None in a forward pass, recomputed ones included."""
    node = torch._C._current_autograd_node()
    # A recomputed block runs with gradients enabled, a derivative only if it is differentiated too.
    return None if node is None or torch.is_grad_enabled() else str(node.name())


def plain_name(operation: str) -> str:
    return operation.rpartition(".")[2].rstrip("_").removesuffix("Backward0").lower()


def inside_of(operation: str, name: str) -> str | None:
    """The operation inside a composite function or node; None if it is the function itself."""
    return None if plain_name(operation) in (name, f"_{name}") else name
