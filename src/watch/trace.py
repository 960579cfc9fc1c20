"""Finds the operation that turned finite numbers into others."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

MAX_POSITIONS = 10

NORM = "norm of the gradient of"
"""Begins the operation of a finding where every entry is finite and their norm is not."""

_MAKES_INFINITIES_ON_PURPOSE = (
    "masked_fill",
    "masked_fill_",
    "fill_",
    "full",
    "full_like",
    "where",
    "empty",
    "empty_like",
    "new_empty",
    "new_full",
)
"""Masks are made of infinities, and fresh memory holds anything."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first place at which something was not finite."""

    phase: str
    """weights: before anything ran; forward; backward."""
    module: str
    """Path of the module whose code ran, or that owns the weight."""
    operation: str
    """Function or autograd node; for weights, the parameter's name."""
    shape: list[int]
    """Of the tensor that was not finite."""
    num_elements: int
    num_nonfinite: int
    positions: list[list[int]]
    """Indices of the first ten such elements."""
    input_absmax: float | None
    """Largest absolute value that went in."""
    dtype: str
    """Of the tensor, such as float32."""
    digest: str
    """SHA-256 of the tensor's bytes: equal where it is bitwise the same."""

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def is_same(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether a step run again found what was recorded, bitwise; None is a step that is finite.

    Args:
        finding: of now.
        recorded: of then, as `plain` gives it.
    """
    if finding is None or recorded is None:
        return finding is None and recorded is None
    now = finding.plain()
    return all(now[name] == recorded[name] for name in ("module", "operation", "digest"))


class Tracer(TorchFunctionMode):
    """Watches every torch function inside a module's forward and backward pass."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.finding: Finding | None = None
        self._path = [""]
        self._owners: list[tuple[Any, str]] = []
        self._handles: list[Any] = []

    @property
    def module(self) -> str:
        """Path of the module that is running."""
        return self._path[-1]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, the tracer knows which module is running; afterwards all hooks are gone."""
        for path, module in self.root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(path)))
            # always_call: a module that raises must not leave its path behind.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._path.append(path)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function and compares what went in with what came out."""
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs)) if self.finding is None else []
        sound = bool(inputs) and _all_finite(inputs)
        # An infinity may be a mask; a NaN that comes of it is none.
        masked = bool(inputs) and not sound and not _any_nan(inputs)
        absmax = _absmax(inputs) if sound else None
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        for tensor in tensors_in(result):
            if tensor.grad_fn is not None:
                self._owners.append((tensor.grad_fn, self.module))
            if self.finding is not None or name in _MAKES_INFINITIES_ON_PURPOSE:
                continue
            if (sound and not _all_finite([tensor])) or (masked and _any_nan([tensor])):
                self._found("forward", self.module, resolve_name(func) or name, tensor, absmax)
        return result

    def watch_backward(self, loss: Tensor) -> None:
        """Hooks every node of the graph of a loss; each knows the module that made it."""
        owners: dict[Any, str] = dict(self._owners)
        todo = [(loss.grad_fn, "")]
        seen = set()
        while todo:
            node, consumer = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            owner = owners.get(node, consumer)
            self._handles.append(node.register_hook(self._backward_hook(owner, node)))
            todo += [(inner, owner) for inner, _ in node.next_functions]

    def _backward_hook(self, owner: str, node: Any) -> Callable[..., None]:
        def hook(grad_inputs: Any, grad_outputs: Any) -> None:
            if self.finding is not None or not _all_finite(tensors_in(grad_outputs)):
                return
            for gradient in tensors_in(grad_inputs):
                if not _all_finite([gradient]):
                    absmax = _absmax(tensors_in(grad_outputs))
                    self._found("backward", owner, node.name(), gradient, absmax)
                    return

        return hook

    def check_weights(self) -> None:
        """Finds a parameter that is not finite, or a NaN in a buffer, before anything has run.

        Infinities in a buffer may be a mask.
        """
        bad: list[tuple[str, Tensor]] = []
        bad += [(n, p) for n, p in self.root.named_parameters() if not _all_finite([p])]
        bad += [(n, b) for n, b in self.root.named_buffers() if _any_nan([b])]
        for name, tensor in bad:
            if self.finding is None:
                module, _, field = name.rpartition(".")
                self._found("weights", module, field, tensor, None)

    def check_gradients(self) -> None:
        """Finds a gradient that is not finite though no operation made it so, or whose norm is not.

        The squares of finite numbers above 1.8e19 are infinite.
        """
        for name, parameter in self.root.named_parameters():
            gradient = parameter.grad
            if self.finding is None and gradient is not None and not _all_finite([gradient]):
                module, _, field = name.rpartition(".")
                self._found("backward", module, f"gradient of {field}", gradient, None)
        self._check_norm()

    def _check_norm(self) -> None:
        """The norm over all gradients, as a guard takes it; named is the largest of them."""
        gradients = [(n, p.grad) for n, p in self.root.named_parameters() if p.grad is not None]
        if self.finding is not None or not gradients:
            return
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in gradients])
        if not _all_finite([norm]):
            name, largest = max(gradients, key=lambda entry: _absmax([entry[1]]))
            module, _, field = name.rpartition(".")
            self._found("backward", module, f"{NORM} {field}", norm, _absmax([largest]))

    def _found(
        self, phase: str, module: str, operation: str, tensor: Tensor, absmax: float | None
    ) -> None:
        tensor = tensor.detach()
        bad = ~tensor.isfinite()
        content = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
        self.finding = Finding(
            phase=phase,
            module=module,
            operation=operation,
            shape=list(tensor.shape),
            num_elements=tensor.numel(),
            num_nonfinite=int(bad.sum()),
            positions=bad.nonzero()[:MAX_POSITIONS].tolist(),
            input_absmax=absmax,
            dtype=str(tensor.dtype).removeprefix("torch."),
            digest=hashlib.sha256(content).hexdigest(),
        )


def trace(
    root: nn.Module, loss_of: Callable[[], Tensor | None], tracer: Tracer | None = None
) -> Finding | None:
    """Runs forward and backward once and names the first operation that was not finite.

    Gradients of `root` are left as the pass makes them.

    Args:
        root: the module that owns the weights.
        loss_of: runs the forward pass and returns the loss; None where there is none.
        tracer: watches; None: one of its own.
    """
    tracer = tracer or Tracer(root)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    with tracer.hooked():
        with tracer:
            loss = loss_of()
        # Functions that run in the backward pass are hooks of somebody's; the nodes have their own.
        # A loss that is not finite though no operation made it so: the backward pass would only
        # carry it on.
        if tracer.finding is None and loss is not None and _all_finite([loss]):
            tracer.watch_backward(loss)
            loss.backward()
            tracer.check_gradients()
    return tracer.finding


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() and t.numel())


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if t.is_floating_point())


def _absmax(tensors: list[Tensor]) -> float:
    values = [t.detach().abs().max().item() for t in tensors if t.is_floating_point() and t.numel()]
    return float(max(values, default=0.0))
