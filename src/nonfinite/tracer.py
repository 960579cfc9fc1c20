"""Finds the operation that turned finite numbers into others."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from nonfinite.snapshot import digest_of

MAX_POSITIONS = 10

NORM = "norm of the gradient of"
"""Begins the operation of a finding where every entry is finite and their norm is not."""

INPUT = "input of"
"""Begins the operation of a finding where a NaN went in that no operation under watch has made."""

LOSS = "loss"
"""The operation of a finding where the loss alone is known to be not finite."""

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
"""Masks are made of infinities; a NaN is no mask, though it may be a value that nobody reads."""

_FRESH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Fresh memory holds anything."""

_WRITE_OVER = ("fill_", "zero_", "copy_")
"""What their first argument held has no part in what it holds afterwards."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first place at which something was not finite."""

    phase: str
    """weights, batch: before anything ran; forward; backward."""
    module: str
    """Path of the module whose code ran, or that owns the weight."""
    operation: str
    """Function or autograd node; the name of a weight; the place in a batch."""
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
    same = finding is None or recorded is None or finding.digest == recorded["digest"]
    return same and is_alike(finding, recorded)


def is_alike(finding: Finding | None, recorded: Mapping[str, Any] | None) -> bool:
    """Whether it is the same operation of the same module, on whatever numbers."""
    if finding is None or recorded is None:
        return finding is None and recorded is None
    return (finding.module, finding.operation) == (recorded["module"], recorded["operation"])


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What is known of the tensors that go into a function."""

    sound: bool
    """Whether they are all finite."""
    has_nan: bool
    taken: Tensor | None
    """The first that holds a NaN, other than one that the function changes in place."""
    may_be_infinite: bool
    """Whether an infinity that comes out of it may be a mask."""
    absmax: float | None


class Tracer(TorchFunctionMode):
    """Watches every torch function inside a module's forward and backward pass.

    What makes numbers that are not finite out of finite ones is the finding. A NaN that is put
    somewhere on purpose, or comes from where nobody watches, and a batch that is not finite, may
    be meant and harmless: the first of them is the finding where the step proves it was not.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.finding: Finding | None = None
        self._batch: Finding | None = None
        self._carried: Finding | None = None
        self._path = [""]
        self._owners: dict[Any, str] = {}
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
        path = self._path.pop()
        # Nodes of what is no torch function, such as an autograd.Function, are the module's that
        # gives them out.
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._owners.setdefault(tensor.grad_fn, path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function and compares what went in with what came out."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        watched = self.finding is None and name not in _FRESH
        inputs = _look_at(name, args, kwargs) if watched else None
        result = func(*args, **kwargs)
        # An assignment to a part returns nothing.
        for tensor in tensors_in(args[:1] if name == "__setitem__" else result):
            if tensor.grad_fn is not None:
                self._owners[tensor.grad_fn] = self.module
            if inputs is not None and self.finding is None:
                self._compare(inputs, resolve_name(func) or name, tensor)
        return result

    def _compare(self, inputs: _Inputs, operation: str, tensor: Tensor) -> None:
        """Judges a function by one of its results."""
        if inputs.sound and not inputs.may_be_infinite:
            if not _all_finite([tensor]):
                self.finding = _found("forward", self.module, operation, tensor, inputs.absmax)
        elif not _any_nan([tensor]):
            return
        elif not inputs.sound and not inputs.has_nan and not inputs.may_be_infinite:
            # An infinity may be a mask; a NaN that comes of it is none.
            made = _found("forward", self.module, operation, tensor, None)
            self.finding = self._batch or made
        elif self._carried is None and not inputs.has_nan:
            self._carried = _found("forward", self.module, operation, tensor, inputs.absmax)
        elif self._carried is None and inputs.taken is not None:
            operation = f"{INPUT} {operation}"
            self._carried = _found("forward", self.module, operation, inputs.taken, None)

    def watch_backward(self, loss: Tensor) -> None:
        """Hooks every node of the graph of a loss; each knows the module that made it."""
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
        """Finds a parameter or a buffer that is spoilt before anything has run."""
        tensors: list[tuple[str, Tensor]] = []
        tensors += [(n, p) for n, p in self.root.named_parameters() if is_spoilt(p)]
        tensors += [(n, b) for n, b in self.root.named_buffers() if is_spoilt(b)]
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
        """Finds what made a loss not finite that no operation has made so."""
        if self.finding is None and not _all_finite([loss]):
            self.finding = self._batch or self._carried or _found("forward", "", LOSS, loss, None)

    def check_gradients(self) -> None:
        """Finds a gradient that is not finite though no operation made it so, or whose norm is not.

        The squares of finite numbers above 1.8e19 are infinite.
        """
        for name, parameter in self.root.named_parameters():
            gradient = parameter.grad
            if self.finding is None and gradient is not None and not _all_finite([gradient]):
                module, _, field = name.rpartition(".")
                made = _found("backward", module, f"gradient of {field}", gradient, None)
                self.finding = self._batch or made
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
            operation = f"{NORM} {field}"
            self.finding = _found("backward", module, operation, norm, _absmax([largest]))


def _look_at(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Inputs:
    """What is known of what goes into a function of this name."""
    tensors = tensors_in((args[1:] if name in _WRITE_OVER else args, kwargs))
    sound = _all_finite(tensors)
    has_nan = not sound and _any_nan(tensors)
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    taken = tensors_in((args[1:] if in_place else args, kwargs)) if has_nan else []
    return _Inputs(
        sound=sound,
        has_nan=has_nan,
        taken=next((tensor for tensor in taken if _any_nan([tensor])), None),
        # What is made of no tensor is a constant.
        may_be_infinite=name in _MAY_PUT_INFINITIES or not tensors,
        absmax=_absmax(tensors) if sound and tensors else None,
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
    """Runs forward and backward once and names what first was not finite.

    None means that the loss and all gradients are finite. Gradients of `root` are left as the pass
    makes them.

    Args:
        root: the module that owns the weights.
        loss_of: runs the forward pass and returns the loss; None where there is none.
        tracer: watches; None: one of its own.
        batch: what the forward pass is given. A tensor in it that holds a NaN, or infinities and
            is no additive mask of 0 and minus infinity, is the finding where the step is not
            finite and no operation on finite numbers made it so; None: unknown.
    """
    tracer = tracer or Tracer(root)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    tracer.check_batch(batch)
    with tracer.hooked():
        # What is compiled would hide its operations.
        with tracer, torch.compiler.set_stance("force_eager"):
            loss = loss_of()
        if loss is not None:
            tracer.check_loss(loss)
        # Functions that run in the backward pass are hooks of somebody's; the nodes have their own.
        if tracer.finding is None and loss is not None:
            tracer.watch_backward(loss)
            loss.backward()
            tracer.check_gradients()
    return tracer.finding


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_spoilt(weight: Tensor) -> bool:
    """Whether a parameter or a buffer holds what no weight may hold.

    Infinities in what is not trained may be a mask.
    """
    return not _all_finite([weight]) if weight.requires_grad else _any_nan([weight])


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is 0 where something is let through and minus infinity where not."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() and t.numel())


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if t.is_floating_point())


def _absmax(tensors: list[Tensor]) -> float:
    values = [t.detach().abs().max().item() for t in tensors if t.is_floating_point() and t.numel()]
    return float(max(values, default=0.0))
