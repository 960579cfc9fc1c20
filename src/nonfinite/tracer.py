"""The tracer: finds the first operation of a step that produced non-finite values."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from nonfinite.snapshot import digest_of

MAX_POSITIONS = 10

NORM = "norm of the gradient of"
"""Prefix of a finding's operation if all gradient entries are finite but their norm is not."""

INPUT = "input of"
"""Prefix of a finding's operation if its input holds a NaN that no traced operation produced."""

LOSS = "loss"
"""A finding's operation if nothing but the loss is known to be non-finite."""

_MAY_PUT_INFINITIES = (
    "masked_fill",
    "masked_fill_",
    "fill_",
    "full_like",
    "where",
    "new_full",
    "new_tensor",
    "__setitem__",
)
"""Functions that may write infinities on purpose, because masks are made of them."""

_FRESH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Functions whose result is uninitialised memory, which may hold anything."""

_WRITE_OVER = ("fill_", "zero_", "copy_")
"""Functions that overwrite their first argument without reading it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first non-finite value of a step, and what produced it."""

    phase: str
    """weights or batch (non-finite before anything ran), forward, or backward."""
    module: str
    """Path of the module that ran the operation or owns the weight."""
    operation: str
    """Function or autograd node, name of a weight, or place in a batch."""
    shape: list[int]
    """Shape of the non-finite tensor."""
    num_elements: int
    num_nonfinite: int
    positions: list[list[int]]
    """Indices of the first ten non-finite elements."""
    input_absmax: float | None
    """Largest absolute value of the inputs; None if unknown or not finite."""
    dtype: str
    """Dtype of the non-finite tensor, such as float32."""
    digest: str
    """SHA-256 of the tensor's bytes."""


def is_same(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether a rerun produced the recorded finding, bitwise.

    Args:
        finding: the rerun's finding; None if it was finite.
        recorded: the recorded finding's fields; None if the step was finite.
    """
    same = finding is None or recorded is None or finding.digest == recorded["digest"]
    return same and is_alike(finding, recorded)


def is_alike(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether module and operation are those of the recorded finding; values may differ."""
    if finding is None or recorded is None:
        return finding is None and recorded is None
    return (finding.module, finding.operation) == (recorded["module"], recorded["operation"])


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Facts about the tensors that go into a function."""

    finite: bool
    """Whether they are all finite."""
    has_nan: bool
    nan_input: Tensor | None
    """The first that holds a NaN, except one that the function changes in place."""
    may_be_infinite: bool
    """Whether an infinity in the result may be a mask."""
    absmax: float | None


class Tracer(TorchFunctionMode):
    """Watches every torch function in a module's forward and backward pass.

    The finding is the first operation that produces non-finite values from finite ones. Three other
    things may be intended and harmless: a NaN that is written on purpose, a NaN that was produced
    where the tracer cannot see, and a non-finite batch. The first of these becomes the finding only
    if the loss or a gradient turns out to be non-finite.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.finding: Finding | None = None
        self._batch: Finding | None = None
        self._suspected: Finding | None = None
        self._path = [""]
        self._owners: dict[Any, str] = {}
        self._handles: list[Any] = []

    @property
    def module(self) -> str:
        """Path of the running module."""
        return self._path[-1]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, hooks tell the tracer which module is running; they are removed afterwards."""
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
        path = self._path.pop()
        # Graph nodes that no torch function created, such as those of an autograd.Function, are
        # attributed to the module that returns them.
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._owners.setdefault(tensor.grad_fn, path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function, and compares its inputs with its results."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        watched = self.finding is None and name not in _FRESH
        inputs = _inspect_inputs(name, args, kwargs) if watched else None
        result = func(*args, **kwargs)
        # __setitem__ returns nothing, so its first argument is checked.
        for tensor in tensors_in(args[:1] if name == "__setitem__" else result):
            if tensor.grad_fn is not None:
                self._owners[tensor.grad_fn] = self.module
            if inputs is not None and self.finding is None:
                self._compare(inputs, resolve_name(func) or name, tensor)
        return result

    def _compare(self, inputs: _Inputs, operation: str, tensor: Tensor) -> None:
        """Checks one result of a function against its inputs."""
        if inputs.finite and not inputs.may_be_infinite:
            if not _all_finite([tensor]):
                self.finding = _found("forward", self.module, operation, tensor, inputs.absmax)
        elif not _any_nan([tensor]):
            return
        elif not inputs.finite and not inputs.has_nan and not inputs.may_be_infinite:
            # An infinite input may be a mask, but a NaN computed from it is not.
            made = _found("forward", self.module, operation, tensor, None)
            self.finding = self._batch or made
        elif self._suspected is None and not inputs.has_nan:
            self._suspected = _found("forward", self.module, operation, tensor, inputs.absmax)
        elif self._suspected is None and inputs.nan_input is not None:
            operation = f"{INPUT} {operation}"
            self._suspected = _found("forward", self.module, operation, inputs.nan_input, None)

    def watch_backward(self, loss: Tensor) -> None:
        """Hooks every node of the loss's graph; attributes each to the module that created it."""
        todo = [(loss.grad_fn, "")]
        seen = set()
        while todo:
            node, consumer = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            owner = self._owners.get(node, consumer)
            self._handles.append(node.register_hook(self._backward_hook(owner, node)))
            todo += [(inner, owner) for inner, _ in node.next_functions]

    def _backward_hook(self, owner: str, node: Any) -> Callable[..., None]:
        def hook(grad_inputs: Any, grad_outputs: Any) -> None:
            if self.finding is not None or not _all_finite(tensors_in(grad_outputs)):
                return
            for gradient in tensors_in(grad_inputs):
                if not _all_finite([gradient]):
                    absmax = _absmax(tensors_in(grad_outputs))
                    made = _found("backward", owner, node.name(), gradient, absmax)
                    self.finding = self._batch or made
                    return

        return hook

    def check_weights(self) -> None:
        """Finds a parameter or buffer that is invalid before anything has run."""
        tensors: list[tuple[str, Tensor]] = []
        tensors += [(n, p) for n, p in self.root.named_parameters() if is_invalid(p)]
        tensors += [(n, b) for n, b in self.root.named_buffers() if is_invalid(b)]
        if tensors:
            name, tensor = tensors[0]
            module, _, field = name.rpartition(".")
            self.finding = _found("weights", module, field, tensor, None)

    def check_batch(self, batch: Any) -> None:
        """Keeps the first tensor of a batch that is not finite, unless it is a mask."""
        tree = dict(batch) if isinstance(batch, Mapping) else batch
        for place, leaf in tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor) and not _all_finite([leaf]) and not _is_mask(leaf):
                self._batch = _found("batch", "", f"batch{keystr(place)}", leaf, None)
                return

    def check_loss(self, loss: Tensor) -> None:
        """Chooses the finding if the loss is non-finite but no operation was seen to cause it."""
        if self.finding is None and not _all_finite([loss]):
            self.finding = self._batch or self._suspected or _found("forward", "", LOSS, loss, None)

    def check_gradients(self) -> None:
        """Finds a non-finite gradient that no traced operation produced, or a non-finite norm.

        The norm of finite gradients can overflow, because squares above 1.8e19 are infinite.
        """
        for name, parameter in self.root.named_parameters():
            gradient = parameter.grad
            if self.finding is None and gradient is not None and not _all_finite([gradient]):
                module, _, field = name.rpartition(".")
                made = _found("backward", module, f"gradient of {field}", gradient, None)
                self.finding = self._batch or made
        self._check_norm()

    def _check_norm(self) -> None:
        """Checks the norm over all gradients, as the guard does; names the largest gradient."""
        gradients = [(n, p.grad) for n, p in self.root.named_parameters() if p.grad is not None]
        if self.finding is not None or not gradients:
            return
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in gradients])
        if not _all_finite([norm]):
            name, largest = max(gradients, key=lambda entry: _absmax([entry[1]]))
            module, _, field = name.rpartition(".")
            operation = f"{NORM} {field}"
            self.finding = _found("backward", module, operation, norm, _absmax([largest]))


def _inspect_inputs(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Inputs:
    """Facts about the inputs of the function with this name."""
    tensors = tensors_in((args[1:] if name in _WRITE_OVER else args, kwargs))
    finite = _all_finite(tensors)
    has_nan = not finite and _any_nan(tensors)
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    read = tensors_in((args[1:] if in_place else args, kwargs)) if has_nan else []
    return _Inputs(
        finite=finite,
        has_nan=has_nan,
        nan_input=next((tensor for tensor in read if _any_nan([tensor])), None),
        # A function without tensor inputs creates a constant, which may be a mask.
        may_be_infinite=name in _MAY_PUT_INFINITIES or not tensors,
        absmax=_absmax(tensors) if finite and tensors else None,
    )


def _found(
    phase: str, module: str, operation: str, tensor: Tensor, absmax: float | None
) -> Finding:
    tensor = tensor.detach()
    bad = ~tensor.isfinite()
    return Finding(
        phase=phase,
        module=module,
        operation=operation,
        shape=list(tensor.shape),
        num_elements=tensor.numel(),
        num_nonfinite=int(bad.sum()),
        positions=bad.nonzero()[:MAX_POSITIONS].tolist(),
        input_absmax=absmax,
        dtype=str(tensor.dtype).removeprefix("torch."),
        digest=digest_of(tensor),
    )


def trace(
    root: nn.Module,
    loss_of: Callable[[], Tensor | None],
    tracer: Tracer | None = None,
    *,
    batch: Any = None,
) -> Finding | None:
    """Runs forward and backward once; returns the first non-finite value and what produced it.

    Args:
        root: the module that owns the weights; it keeps the gradients of the pass.
        loss_of: runs the forward pass and returns the loss, or None if there is no loss.
        tracer: the tracer to use; None: a new one.
        batch: input of the forward pass; None if unknown. A tensor in it with NaN or infinities,
            unless it is an additive mask of 0 and -inf, is the finding if the step is non-finite
            and no operation produced that from finite values.

    Returns:
        The finding; None if the loss and all gradients are finite.
    """
    tracer = tracer or Tracer(root)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    tracer.check_batch(batch)
    with tracer.hooked():
        # Compiled code would hide its operations.
        with tracer, torch.compiler.set_stance("force_eager"):
            loss = loss_of()
        if loss is not None:
            tracer.check_loss(loss)
        # The backward pass runs outside the function mode: torch functions there belong to users'
        # hooks, and the nodes of the graph have hooks of their own.
        if tracer.finding is None and loss is not None:
            tracer.watch_backward(loss)
            loss.backward()
            tracer.check_gradients()
    return tracer.finding


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_invalid(weight: Tensor) -> bool:
    """Whether a parameter or buffer holds NaN, or infinities if it is trained.

    Infinities in an untrained tensor may be a mask.
    """
    return not _all_finite([weight]) if weight.requires_grad else _any_nan([weight])


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is an additive mask, which holds only 0 and -inf."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() and t.numel())


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if t.is_floating_point())


def _absmax(tensors: list[Tensor]) -> float:
    values = [t.detach().abs().max().item() for t in tensors if t.is_floating_point() and t.numel()]
    return float(max(values, default=0.0))
