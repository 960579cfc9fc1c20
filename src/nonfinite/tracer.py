"""The tracer: finds the operation that made the non-finite values of a loss or of its gradients.

It watches every operation below autograd, in the forward pass, in recomputed blocks, and in the
backward pass, and keeps for each piece of memory where its non-finite values come from. Only an
origin that reaches the loss or a gradient becomes the finding, so that masks and values that are
merely logged do no harm.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nonfinite.batch_tensors import first_nonfinite, tensors_of
from nonfinite.finding import INPUT, LOSS, Finding, Growth, found, norm_overflow
from nonfinite.finite_checks import (
    absmax,
    all_finite,
    any_nan,
    can_be_nonfinite,
    growth_factor,
    is_invalid,
    is_mask,
    tensors_in,
)
from nonfinite.function_names import FunctionNames, inside_of, running_derivative
from nonfinite.mechanisms import COMPUTED_WRITES, WRITTEN, Call
from nonfinite.operand_rules import explain
from nonfinite.origins import (
    FRESH,
    MADE,
    MEANT,
    READ,
    LostOverflows,
    Origin,
    Origins,
    Placed,
    first_of,
    fresh_values,
    is_written,
    kept_operands,
    memory_of,
    name_of,
    num_bytes,
    whence,
    writes_to_operand,
)
from nonfinite.source_lines import Source, of_node


class Tracer(TorchDispatchMode):
    """Watches the operations of a module's forward and backward pass; see the module's docstring.

    Args:
        root: the module that owns the weights.
        measures_growth: also keeps the operation at which gradients grow most.
    """

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module, *, measures_growth: bool = False) -> None:
        super().__init__()
        self.root, self.measures_growth = root, measures_growth
        self.finding: Finding | None = None
        self.growth: Growth | None = None
        self._names = FunctionNames(self)
        self._path = [""]
        self._paths: dict[int, str] = {}
        self._origins = Origins()
        self._lost = LostOverflows()
        self._batch: Finding | None = None
        self._num_origins = 0
        # Memory whose address is in use must not be freed and given to another tensor.
        self._kept: list[Any] = []
        self._handles: list[Any] = []

    @property
    def module(self) -> str:
        """Path of the running module."""
        return self._path[-1]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the tracer sees every operation, and knows which module is running."""
        for path, module in self.root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(path)))
            # always_call: a module that raises must not leave its path behind.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        try:
            with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
                warnings.simplefilter("ignore")
                # Each node of the graph then keeps the traceback of its forward call.
                torch.autograd.set_detect_anomaly(True, check_nan=False)
                with self._names, self:
                    yield
        finally:
            torch.autograd.set_detect_anomaly(*anomaly)
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def before_function(self, func: Any, args: Any, kwargs: Any) -> None:
        """Called before each torch function; for tracers that measure more."""

    def after_function(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Called after each torch function; for tracers that measure more."""

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._path.append(path)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._path.pop()
        # Nodes that no operation below autograd created, such as those of an autograd.Function,
        # are attributed to the module that returns them.
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._paths.setdefault(tensor.grad_fn._sequence_nr(), path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if running_derivative() is None:
            self._paths.setdefault(torch.autograd._get_sequence_nr() - 1, self.module)
        before = kept_operands(schema, args)
        result = func(*args, **kwargs)
        if self.finding is None:
            self._look(func, before, kwargs, tensors_in(args), result)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, own: list[Tensor], result: Any) -> None:
        """Updates the origins of every result of an operation."""
        name, operands = name_of(func), tensors_in((args, kwargs))
        shared = {memory_of(tensor) for tensor in own}
        for tensor in tensors_in(result):
            memory = memory_of(tensor)
            self._lost.follow([] if name in FRESH else operands, memory, self._origins)
            if not can_be_nonfinite(tensor) or name in FRESH:
                self._origins.forget(tensor)
            elif all_finite([tensor]):
                covers = tensor.numel() * tensor.element_size() >= num_bytes(tensor)
                if memory not in shared or covers:
                    self._origins.forget(tensor)
                if self.measures_growth and torch._C._current_autograd_node() is not None:
                    self._measure(operands, tensor)
            else:
                placed = self._placed(func, args, kwargs, operands, tensor)
                is_view = memory in shared and not writes_to_operand(func)
                self._origins.put(tensor, placed, is_view=is_view)
                self._kept.append(tensor.detach())

    def _placed(
        self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], tensor: Tensor
    ) -> list[Placed]:
        """Where the non-finite values of a result come from, and which elements they are."""
        name = name_of(func)
        bad = [operand for operand in operands if not all_finite([operand])]
        nans = [operand for operand in bad if any_nan([operand])]
        known = self._origins.of(read := nans or bad)
        if nans or (bad and not any_nan([tensor])):
            if not known:
                # A number in the code, such as that of x[i] = nan, comes as a tensor.
                origin = self._from_outside(read, name)
                if all(operand.dim() == 0 for operand in read):
                    origin = self._written(name, args, kwargs, tensor)
                return [(origin, ~tensor.isfinite())]
        elif all(origin.kind == MEANT for origin in known):
            # Infinities of a mask are no fault, but a NaN made of them is.
            origin = self._made(name, args, kwargs, operands, tensor, of=known)
            return [(origin, ~tensor.isfinite())]
        placed = self._origins.inherited(func, args, kwargs, read, tensor)
        rest = fresh_values(func, bad, tensor)
        if rest is not None:
            # Beside values that came with an operand, the operation made others.
            made = self._made(name, args, kwargs, operands, rest)
            placed.append((made, ~rest.isfinite()))
        return placed

    def _made(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        tensor: Tensor,
        of: Sequence[Origin] = (),
    ) -> Origin:
        """The origin of values that an operation wrote, or made, maybe of infinities from `of`."""
        is_computed = self._names.runs(*COMPUTED_WRITES)
        if is_written(name, (args, kwargs), operands, tensor, is_computed=is_computed):
            return self._written(name, args, kwargs, tensor)
        finding = self._seen(name, args, kwargs, tensor)
        if of and finding.detail is not None:
            finding = replace(finding, detail=finding.detail + whence(of))
        return self._new(MADE, finding)

    def _written(self, name: str, args: Any, kwargs: Any, tensor: Tensor) -> Origin:
        """The origin of a value that the code wrote, such as a mask's infinity."""
        finding = self._seen(name, args, kwargs, tensor, explained=False)
        detail = f"it was written by {name}, so it was meant, but reached the loss or a gradient"
        return self._new(MEANT, replace(finding, mechanism=WRITTEN, detail=detail))

    def _from_outside(self, bad: list[Tensor], name: str) -> Origin:
        """The origin of values that were there before an operation of the step read them."""
        finding = found(
            self._phase(),
            self._module_of_operation(),
            f"{INPUT} {self._operation(name)}",
            bad[0],
            source=self._source(),
        )
        return self._new(READ if any_nan(bad) else MEANT, finding)

    def _new(self, kind: str, finding: Finding) -> Origin:
        self._num_origins += 1
        return Origin(kind=kind, order=self._num_origins, finding=finding)

    def _seen(
        self, name: str, args: Any, kwargs: Any, tensor: Tensor, *, explained: bool = True
    ) -> Finding:
        """The finding of an operation that made, or wrote, a non-finite value."""
        operands = tensors_in((args, kwargs))
        finite = bool(operands) and all_finite(operands)
        operation, node = self._operation(name), running_derivative()
        said = None
        if explained:
            function = self._names.running[-1] if self._names.running else ""
            call = Call(
                name=name, args=args, kwargs=kwargs, result=tensor, node=node, function=function
            )
            said = explain(call)
        return found(
            self._phase(),
            self._module_of_operation(),
            operation,
            tensor,
            input_absmax=absmax(operands) if finite and operands[0].numel() else None,
            inside=inside_of(operation, name),
            source=self._source(),
            mechanism=None if said is None else said[0],
            detail=None if said is None else said[1] + self._lost.before(operands),
        )

    def _phase(self) -> str:
        return "forward" if running_derivative() is None else "backward"

    def _operation(self, name: str) -> str:
        node = torch._C._current_autograd_node()
        if running_derivative() is not None and node is not None:
            variable = getattr(node, "variable", None)
            if variable is None:
                return str(node.name())
            return f"gradient of {self._name_of(variable).rpartition('.')[2]}"
        return self._names.running[-1] if self._names.running else f"aten.{name}"

    def _module_of_operation(self) -> str:
        node = torch._C._current_autograd_node()
        if running_derivative() is None or node is None:
            return self.module
        if hasattr(node, "variable"):
            return self._name_of(node.variable).rpartition(".")[0]
        return self._paths.get(node._sequence_nr(), "")

    def _name_of(self, parameter: Tensor) -> str:
        named = self.root.named_parameters(remove_duplicate=False)
        return next((name for name, known in named if known is parameter), "a tensor")

    def _source(self) -> Source | None:
        node = None if running_derivative() is None else torch._C._current_autograd_node()
        return of_node(node, trace_forward_and_backward.__code__)

    def _measure(self, operands: list[Tensor], result: Tensor) -> None:
        factor = 1.0 if running_derivative() is None else growth_factor(operands, result)
        if factor > (1.0 if self.growth is None else self.growth.factor):
            self.growth = Growth(
                factor=factor,
                module=self._module_of_operation(),
                operation=self._operation("operation"),
                source=self._source(),
            )

    def check_weights(self) -> None:
        """Finds a parameter or buffer that is invalid before anything has run."""
        named: list[tuple[str, Tensor]] = [*self.root.named_parameters()]
        named += [*self.root.named_buffers()]
        for name, tensor in [entry for entry in named if is_invalid(entry[1])][:1]:
            module, _, field = name.rpartition(".")
            self.finding = found("weights", module, field, tensor)
        for _, tensor in named:
            if not all_finite([tensor]):
                self._bring(tensor, MEANT, found("weights", "", "a mask", tensor))

    def check_batch(self, batch: Any) -> None:
        """Keeps the first tensor of a batch that is not finite, unless it is a mask."""
        first = first_nonfinite(batch)
        if first is not None:
            self._batch = found("batch", "", first[0], first[1])
        for _, tensor in tensors_of(batch):
            if can_be_nonfinite(tensor) and not all_finite([tensor]):
                kind = MEANT if is_mask(tensor) else READ
                self._bring(tensor, kind, self._batch or found("batch", "", "a mask", tensor))

    def _bring(self, tensor: Tensor, kind: str, finding: Finding) -> None:
        """Keeps the origin of a tensor from before the trace."""
        self._kept.append(tensor)
        self._origins.put(tensor, [(Origin(kind=kind, order=0, finding=finding), None)])

    def _chosen(self, origin: Origin) -> Finding:
        """The finding for an origin: what was read from outside is the batch's, if that is bad."""
        if origin.kind == READ and self._batch is not None:
            return self._batch
        return origin.finding

    def check_loss(self, loss: Tensor) -> None:
        """Chooses the finding if the loss is not finite."""
        if self.finding is None and not all_finite([loss]):
            known = self._origins.of([loss])
            made = self._batch or found("forward", "", LOSS, loss)
            self.finding = self._chosen(first_of(known)) if known else made

    def check_gradients(self) -> None:
        """Chooses the finding if a gradient, or the norm of all, is not finite.

        The norm of finite gradients can overflow, because squares above 1.8e19 are infinite.
        """
        if self.finding is not None:
            return
        named = [(n, p.grad) for n, p in self.root.named_parameters() if p.grad is not None]
        bad = [(name, gradient) for name, gradient in named if not all_finite([gradient])]
        known = self._origins.of([gradient for _, gradient in bad])
        if known:
            self.finding = self._chosen(first_of(known))
        elif bad:
            module, _, field = bad[0][0].rpartition(".")
            made = found("backward", module, f"gradient of {field}", bad[0][1])
            self.finding = self._batch or made
        elif named:
            self.finding = norm_overflow(named)


def trace(
    root: nn.Module,
    loss_of: Callable[[], Tensor | None],
    tracer: Tracer | None = None,
    *,
    batch: Any = None,
) -> Finding | None:
    """Runs forward and backward once; returns the origin of non-finite values in loss or gradients.

    Args:
        root: the module that owns the weights; it keeps the gradients of the pass.
        loss_of: runs the forward pass and returns the loss, or None if there is no loss.
        tracer: the tracer to use; None: a new one.
        batch: input of the forward pass; None if unknown. A tensor in it with NaN or infinities,
            unless it is an additive mask of 0 and -inf, is the finding if the step is non-finite
            because of it.

    Returns:
        The finding, which prints as a sentence; None if the loss and all gradients are finite.
    """
    tracer = tracer or Tracer(root)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    tracer.check_batch(batch)
    trace_forward_and_backward(tracer, loss_of)
    return tracer.finding


def trace_forward_and_backward(
    tracer: Tracer,
    forward: Callable[[], Any],
    backward: Callable[[Any], None] | None = None,
) -> None:
    """Runs both passes under the tracer; frames above this function are never named.

    Args:
        tracer: it gets the finding.
        forward: runs the forward pass; returns the loss, or what `backward` takes.
        backward: runs the backward pass and checks its result; None: that of the loss.
    """
    with tracer.watching():
        result = forward()
        if backward is not None:
            backward(result)
        elif result is not None:
            with torch._C._DisableTorchDispatch():
                tracer.check_loss(result)
            if tracer.finding is None:
                torch.autograd.backward([result])
                with torch._C._DisableTorchDispatch():
                    tracer.check_gradients()
