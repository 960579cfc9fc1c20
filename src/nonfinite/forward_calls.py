"""One forward pass of a watched model: what is kept of it, and how it is run again."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nonfinite.batch_tensors import tensors_of
from nonfinite.buffers import Copies, put_back
from nonfinite.finding import Finding, found
from nonfinite.finite_checks import all_finite
from nonfinite.incident_files import with_plain_values
from nonfinite.snapshot import set_raw_host_states
from nonfinite.spike_rule import guilty_row, num_rows, with_rows
from nonfinite.tracer import Tracer, trace_forward_and_backward

LossOf = Callable[[Any], Tensor]


@dataclass(kw_only=True)
class ForwardCall:
    """The inputs of a forward pass, the state before it, and the gradients that came back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    """How often each input tensor had been changed in place."""
    buffers: Copies
    rng: Tensor
    cuda_rng: Tensor | None
    host_rng: Any
    autocast: tuple[tuple[str, torch.dtype], ...]
    training: tuple[bool, ...]
    """Whether each module was in training mode, in the order of `modules()`."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """The gradient that came back to each output, by the output's place."""
    backward_pass: int = -1
    """The number of the backward pass in which the first gradient came back."""
    is_differentiated_twice: bool = False
    """Whether a backward pass through the outputs built a graph of its own."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """The sum of each output, on its device, which tells whether the output was finite."""
    losses: list[int] = field(default_factory=list)
    """Places of outputs of one number, which are losses if a gradient came back to them."""
    is_same: bool = True
    """Whether the rerun gave the same sums."""

    @classmethod
    def of(
        cls,
        training: tuple[bool, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        buffers: Copies,
        host_rng: Any,
    ) -> "ForwardCall":
        """What has to be kept before a forward pass.

        Args:
            training: whether each module is in training mode, in the order of `modules()`.
            args, kwargs: the inputs.
            buffers: copies of the buffers.
            host_rng: from `raw_host_states`, or None.
        """
        return cls(
            args=args,
            kwargs=kwargs,
            versions=_versions((args, kwargs)),
            buffers=buffers,
            rng=torch.default_generator.get_state(),
            cuda_rng=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            host_rng=host_rng,
            autocast=tuple(
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda")
                if torch.is_autocast_enabled(device)
            ),
            training=training,
        )

    def follow(self, output: Any, begins: Callable[["ForwardCall"], None]) -> None:
        """Registers hooks that keep the gradient coming back to each output.

        Args:
            output: what the model returned.
            begins: called when the first gradient comes back.
        """
        for place, tensor in enumerate(_tensors(output)):
            # A weight that is returned as it is would keep the hook for good.
            if tensor.requires_grad and not tensor.is_leaf:
                self.sums[place] = tensor.detach().sum()
                if not tensor.dim():
                    self.losses.append(place)
                tensor.register_hook(self._keeper(place, begins))

    def _keeper(
        self, place: int, begins: Callable[["ForwardCall"], None]
    ) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if torch.is_grad_enabled():
                self.is_differentiated_twice = True
                return
            if not self.gradients:
                self.backward_pass = torch._C._current_graph_task_id()
                begins(self)
            known = self.gradients.get(place)
            # Several losses may send gradients back one after the other.
            self.gradients[place] = gradient.detach() if known is None else known + gradient

        return keep

    @property
    def was_finite(self) -> bool:
        """Whether all outputs were finite."""
        return all_finite(list(self.sums.values()))

    @property
    def loss_was_finite(self) -> bool:
        """Whether the losses that the model itself returned were finite."""
        return all_finite([self.sums[place] for place in self.losses if place in self.gradients])

    @property
    def came_back_finite(self) -> bool:
        """Whether the gradients that came back were finite."""
        return all_finite(list(self.gradients.values()))

    @property
    def inputs_changed(self) -> bool:
        """Whether an input was changed in place since, so that it is not what it was."""
        return self.versions != _versions((self.args, self.kwargs))

    def on_cpu(self) -> "ForwardCall":
        """The call with its tensors on the CPU, for a copy of the model there."""
        parts = ("args", "kwargs", "gradients", "sums")
        return replace(self, **{name: _to_cpu(getattr(self, name)) for name in parts})

    def with_rows(self, rows: Sequence[int], total: int) -> "ForwardCall":
        """The call with some rows of its inputs, and of the gradients that came back."""
        parts = ("args", "kwargs", "gradients")
        return replace(
            self, **{name: with_rows(getattr(self, name), rows, total) for name in parts}
        )

    def saved(self) -> dict[str, Any]:
        """The call as tensors and plain values."""
        args, kwargs = _detached((self.args, self.kwargs))
        return {
            "args": with_plain_values(args),
            "kwargs": with_plain_values(kwargs),
            "buffers": dict(self.buffers),
            "rng": self.rng,
            "cuda_rng": self.cuda_rng,
            "autocast": [list(entry) for entry in self.autocast],
            "training": list(self.training),
            "gradients": dict(self.gradients),
            "sums": dict(self.sums),
        }

    @classmethod
    def loaded(cls, saved: dict[str, Any]) -> "ForwardCall":
        """The call in a saved incident."""
        args, kwargs = tuple(saved["args"]), dict(saved["kwargs"])
        return cls(
            args=args,
            kwargs=kwargs,
            versions=_versions((args, kwargs)),
            buffers=saved["buffers"],
            rng=saved["rng"],
            cuda_rng=saved["cuda_rng"],
            host_rng=None,
            autocast=tuple((device, dtype) for device, dtype in saved["autocast"]),
            training=tuple(saved["training"]),
            gradients=saved["gradients"],
            sums=saved["sums"],
        )


def run_call(
    module: nn.Module,
    tracer: Tracer,
    call: ForwardCall,
    *,
    loss_of: LossOf | None = None,
    all_were_finite: bool = True,
    is_distributed: bool = False,
) -> Finding | None:
    """Runs a forward pass again, and the backward pass from the gradient that came back.

    Args:
        module: the model; the caller restores it.
        tracer: watches both passes.
        call: what was kept.
        loss_of: the loss of the output; then the backward pass starts there.
        all_were_finite: whether the outputs of all calls of the step were finite, so that a
            non-finite gradient that comes back is the loss's.
        is_distributed: whether backward passes would wait for other processes.
    """
    forward = _prepared(module, call)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    tracer.check_batch((*call.args, call.kwargs) if call.kwargs else call.args)

    def loss() -> Any:
        return forward() if loss_of is None else loss_of(forward())

    def backward(output: Any) -> None:
        _backward(module, tracer, call, output, all_were_finite, is_distributed)

    with _modes(module, call.training):
        trace_forward_and_backward(tracer, loss, backward if loss_of is None else None)
    return tracer.finding


def guilty_row_of(module: nn.Module, call: ForwardCall) -> dict[str, Any] | None:
    """The row of a call's inputs without which there is no spike; None if no single row made it.

    Args:
        module: the model; the caller restores it.
        call: the only forward pass of the step.
    """
    total = num_rows((call.args, call.kwargs))
    if total is None:
        return None

    def norm_of(rows: Sequence[int]) -> float:
        some = call.with_rows(rows, total)
        forward = _prepared(module, some)
        for parameter in module.parameters():
            parameter.grad = None
        with _modes(module, some.training):
            outputs = dict(enumerate(_tensors(forward())))
        torch.autograd.backward(
            [outputs[place] for place in some.gradients], list(some.gradients.values())
        )
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    # A model need not accept other numbers of rows, nor have a row of output for each.
    try:
        return guilty_row(total, norm_of)
    except Exception:
        return None


def why_finite(calls: Sequence[ForwardCall]) -> str:
    """Why a gradient may be non-finite although the same outputs give finite ones."""
    if any(call.is_differentiated_twice for call in calls):
        return (
            "The rerun gave the same outputs and finite gradients, but without the second"
            " derivative: look at the term that needs one, such as a gradient penalty."
        )
    return (
        "The rerun gave the same outputs and finite gradients, so that the gradient was made"
        " non-finite elsewhere: by clipping, by whatever else changes it before the update, or by a"
        " term of the loss that uses the weights directly."
    )


def _prepared(module: nn.Module, call: ForwardCall) -> Callable[[], Any]:
    """Restores the state before a forward pass; returns a function that runs it again."""
    torch.set_rng_state(call.rng)
    if call.cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(call.cuda_rng)
    if call.host_rng is not None:
        set_raw_host_states(call.host_rng)
    put_back(module, call.buffers)
    # Detached, so that the backward pass ends here and not in whatever made the inputs.
    args, kwargs = _detached((call.args, call.kwargs))

    def forward() -> Any:
        with ExitStack() as stack:
            for device, dtype in call.autocast:
                context: AbstractContextManager[Any] = torch.autocast(device, dtype=dtype)
                stack.enter_context(context)
            return module(*args, **kwargs)

    return forward


def _backward(
    module: nn.Module,
    tracer: Tracer,
    call: ForwardCall,
    output: Any,
    all_were_finite: bool,
    is_distributed: bool,
) -> None:
    """The backward pass from the model's outputs."""
    tensors = dict(enumerate(_tensors(output)))
    places = [place for place in call.gradients if place in tensors]
    outputs = [tensors[place] for place in places]
    gradients = [call.gradients[place] for place in places]
    with torch._C._DisableTorchDispatch():
        call.is_same = all(
            torch.equal(tensors[place].detach().sum(), call.sums[place]) for place in places
        )
        for tensor in outputs:
            if not tensor.dim():
                tracer.check_loss(tensor)
        if tracer.finding is not None:
            return
        bad = [gradient for gradient in gradients if not all_finite([gradient])]
        if bad:
            for tensor in outputs:
                tracer.check_loss(tensor)
            if tracer.finding is None and all_were_finite:
                tracer.finding = found("loss", "", "the model's output", bad[0])
            # Otherwise outputs of the step were not finite, and those of the rerun are.
            return
    if is_distributed:
        # Backward passes of a distributed module would wait for the other processes.
        params = [p for p in module.parameters() if p.requires_grad]
        made = torch.autograd.grad(outputs, params, gradients, allow_unused=True)
        for parameter, gradient in zip(params, made, strict=True):
            parameter.grad = gradient
    else:
        torch.autograd.backward(outputs, gradients)
    with torch._C._DisableTorchDispatch():
        tracer.check_gradients()


@contextmanager
def _modes(module: nn.Module, training: tuple[bool, ...]) -> Any:
    """Inside, each module is in the mode in which it was."""
    modules = list(module.modules())
    before = [inner.training for inner in modules]
    if len(training) == len(modules):
        for inner, mode in zip(modules, training, strict=True):
            inner.training = mode
    try:
        yield
    finally:
        for inner, mode in zip(modules, before, strict=True):
            inner.training = mode


def _to_cpu(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)


def _detached(tree: Any) -> Any:
    """The inputs as leaves of a graph of their own."""
    return tree_map(
        lambda leaf: (
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        ),
        tree,
    )


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors in inputs or outputs, which mostly are one tensor."""
    return (value,) if isinstance(value, Tensor) else (tensor for _, tensor in tensors_of(value))


def _versions(inputs: tuple[Any, Any]) -> tuple[int, ...]:
    args, kwargs = inputs
    flat = (*args, *kwargs.values())
    # Looking into containers takes longer, and most models take none.
    is_flat = all(isinstance(value, Tensor) for value in flat)
    tensors = flat if is_flat else [tensor for _, tensor in tensors_of(inputs)]
    return tuple([tensor._version for tensor in tensors if not tensor.is_inference()])
