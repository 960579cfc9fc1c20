"""`watch(model, optimizer)`: guards and explains the steps of any training loop.

Hooks on the model keep the inputs of each forward pass and the gradient that comes back to its
outputs; hooks on the optimizer look at the gradient before it is applied. If it is not finite, the
passes are run again under the tracer, from the same state.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.batch_tensors import tensors_of
from nonfinite.buffers import BufferCopies, Copies, put_back
from nonfinite.causes import Evidence
from nonfinite.finding import Finding, found
from nonfinite.finite_checks import all_finite
from nonfinite.incident_files import with_plain_values
from nonfinite.recording import (
    Rerun,
    largest_gradients,
    lines_of,
    make_incident,
    make_spike,
    run_again,
    save,
    second_moment_finite,
    unrecorded,
    weight_absmax,
)
from nonfinite.snapshot import raw_host_states, set_raw_host_states
from nonfinite.spike_rule import is_spike
from nonfinite.tracer import Tracer, trace_forward_and_backward
from nonfinite.update_check import UpdateCheck, UpdateFault, names_of

ON_NONFINITE = ("skip", "raise", "stop", "warn")

MAX_CALLS = 64
"""Forward passes of one step whose inputs are kept."""

RING = 256
"""Last steps whose gradient norms are kept."""

COMMAND = "python -m nonfinite {folder} --model <package.module:callable>"

LossOf = Callable[[Any], Tensor]


@dataclass(kw_only=True)
class _Call:
    """One forward pass of the model, as it has to be run again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    buffers: Copies
    rng: Tensor
    cuda_rng: Tensor | None
    host_rng: Any
    autocast: tuple[tuple[str, torch.dtype], ...]
    training: bool
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """The gradient that came back to each output, by the output's place."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """The sum of each output, on its device, which tells whether the output was finite."""


class Watch:
    """What `watch` returns; see there. A context manager that removes the hooks at its end.

    Attributes:
        incidents: what was recorded, as in incident.json.
        stopped: whether a step was not finite and `on_nonfinite` is stop.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        on_nonfinite: str,
        folder: Path,
        loss_of: LossOf | None,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self.root: nn.Module = getattr(model, "module", model) if _is_ddp(model) else model
        self.on_nonfinite, self.folder = on_nonfinite, folder
        self.loss_of, self.say = loss_of, say
        self.incidents: list[dict[str, Any]] = []
        self.stopped = False
        self.nonfinite_steps: list[int] = []
        self.skipped = 0
        self._steps = dict.fromkeys(map(id, optimizers), 0)
        self._updates = {id(o): UpdateCheck(o, names_of(self.root)) for o in optimizers}
        self._calls: deque[_Call] = deque(maxlen=MAX_CALLS)
        self._is_new_step = True
        self._is_rerun = False
        self._sound: dict[int, bool] = {}
        self._ring: deque[dict[str, float]] = deque(maxlen=RING)
        self._buffers = BufferCopies(self.root)
        # Compiled code must call the hooks as they are.
        before, after = torch._dynamo.disable(self._before), torch._dynamo.disable(self._after)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            self._handles.append(optimizer.register_step_post_hook(self._after_update))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def summary(self) -> dict[str, Any]:
        """Steps, non-finite steps, skipped steps, and the line of each incident."""
        return {
            "steps": max(self._steps.values()),
            "nonfinite_steps": list(self.nonfinite_steps),
            "skipped_steps": self.skipped,
            "incidents": [incident["line"] for incident in self.incidents],
        }

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the inputs and the state of a forward pass that may be differentiated."""
        if self._is_rerun or not torch.is_grad_enabled():
            return
        # A GradScaler may leave out a step; then its gradients are gone, and so are its passes.
        left_out = any(call.gradients for call in self._calls) and all(
            parameter.grad is None for parameter in self.root.parameters()
        )
        if self._is_new_step or left_out:
            self._calls.clear()
            self._is_new_step = False
        self._calls.append(
            _Call(
                args=args,
                kwargs=kwargs,
                buffers=self._buffers.current(),
                rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
                host_rng=raw_host_states(),
                autocast=tuple(
                    (device, torch.get_autocast_dtype(device))
                    for device in ("cpu", "cuda")
                    if torch.is_autocast_enabled(device)
                ),
                training=module.training,
            )
        )

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Will keep the gradient that comes back to each output."""
        if self._is_rerun or not torch.is_grad_enabled() or not self._calls:
            return
        call = self._calls[-1]
        for place, (_, tensor) in enumerate(tensors_of(output)):
            if tensor.requires_grad:
                call.sums[place] = tensor.detach().sum()
                tensor.register_hook(_keeper(call, place))

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Looks at the gradient; with a closure, after the closure has computed it."""
        # The first argument is the optimizer itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._check(optimizer)
            return None

        def checked() -> Any:
            loss = closure()
            self._check(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": checked}

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """Decides what happens to a step.

        Raises:
            FloatingPointError: it is not finite and `on_nonfinite` is raise.
        """
        step = self._steps[id(optimizer)] = self._steps[id(optimizer)] + 1
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            # A fused optimizer leaves out the steps in which a GradScaler found an overflow.
            self._sound[id(optimizer)] = False
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        finite = norm - norm == 0.0
        fault = self._updates[id(optimizer)].rate_fault() if finite else None
        self._sound[id(optimizer)] = finite and fault is None
        if finite and fault is None:
            if not self._has("spike") and is_spike(norm, [e["grad_norm"] for e in self._ring]):
                self._record(optimizer, step, None, norm=norm)
            self._ring.append({"step": step, "grad_norm": norm})
            if self.stopped:
                self._drop(params)
            return
        self.nonfinite_steps.append(step)
        if not self._has("non-finite"):
            self._record(optimizer, step, fault)
        if self.on_nonfinite == "raise":
            raise FloatingPointError(self._what(step))
        if self.on_nonfinite == "warn":
            return
        self._drop(params)
        self.skipped += 1
        self.stopped = self.stopped or self.on_nonfinite == "stop"

    def _drop(self, params: Iterable[nn.Parameter]) -> None:
        """Leaves the optimizer nothing to apply, and puts the buffers back."""
        for parameter in params:
            parameter.grad = None
        if self._calls:
            put_back(self.root, self._calls[0].buffers)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Looks at the weights where the optimizer could have divided by 0."""
        self._is_new_step = True
        if not self._sound.get(id(optimizer), False):
            return
        fault = self._updates[id(optimizer)].applied_fault(gradients=False)
        if fault is None:
            return
        step = self._steps[id(optimizer)]
        self.nonfinite_steps.append(step)
        if not self._has("non-finite"):
            self._record(optimizer, step, fault)
        if self.on_nonfinite == "raise":
            raise FloatingPointError(self._what(step))
        self.stopped = self.stopped or self.on_nonfinite == "stop"

    def _has(self, kind: str) -> bool:
        return any(incident["kind"] == kind for incident in self.incidents)

    def _what(self, step: int) -> str:
        lines = [i["line"] for i in self.incidents if i["step"] == step]
        return lines[0] if lines else f"step {step}: non-finite gradient"

    def _record(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        fault: UpdateFault | None,
        *,
        norm: float | None = None,
    ) -> None:
        """Records an incident; an error in the recorder is reported and never stops the loop."""
        kind = "non-finite" if norm is None else "spike"
        remarks: list[str] = []
        try:
            incident, remarks = self._explained(optimizer, step, fault, norm)
        except Exception as error:
            incident = unrecorded(step, kind, error)
        self.incidents.append(incident)
        for line in [*lines_of(incident), *remarks]:
            self.say(line)

    def _explained(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        fault: UpdateFault | None,
        norm: float | None,
    ) -> tuple[dict[str, Any], list[str]]:
        calls = [call for call in self._calls if call.gradients or self.loss_of is not None]
        rerun = Rerun(router={})
        if fault is None and calls:
            self._is_rerun = True
            try:
                passes = [self._pass(call) for call in calls]
                rerun = run_again(self.root, passes, measures_growth=norm is not None)
            finally:
                self._is_rerun = False
        if norm is not None:
            incident = make_spike(
                step, norm, rerun, row=None, largest_gradients=largest_gradients(self.root)
            )
        else:
            why = rerun.why_finite
            if fault is None and not calls:
                why = "No gradient came back through the model's outputs, so nothing was run again."
            evidence = Evidence(
                finding=rerun.finding,
                router=rerun.router,
                second_moment_finite=fault is not None or second_moment_finite(optimizer),
                weight_absmax=weight_absmax(self.root),
                last={},
                update=fault,
                why_finite=why,
            )
            incident = make_incident(
                step, evidence, rerun, largest_gradients=largest_gradients(self.root)
            )
        folder = self.folder / f"step-{step}"
        if _rank() > 0:
            return incident, []
        state = {"state_dict": self.root.state_dict(), "calls": [_saved(c) for c in calls]}
        return incident, save(folder, incident, state, list(self._ring), command=COMMAND)

    def _pass(self, call: _Call) -> Callable[[nn.Module, Tracer], Finding | None]:
        def run(module: nn.Module, tracer: Tracer) -> Finding | None:
            return run_call(
                module,
                tracer,
                call,
                loss_of=self.loss_of,
                is_distributed=self.root is not self.model,
            )

        return run


def run_call(
    module: nn.Module,
    tracer: Tracer,
    call: _Call,
    *,
    loss_of: LossOf | None,
    is_distributed: bool = False,
) -> Finding | None:
    """Runs a kept forward pass again, and the backward pass from the gradient that came back."""
    torch.set_rng_state(call.rng)
    if call.cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(call.cuda_rng)
    set_raw_host_states(call.host_rng)
    put_back(module, call.buffers)
    tracer.check_weights()
    if tracer.finding is not None:
        return tracer.finding
    tracer.check_batch((*call.args, call.kwargs) if call.kwargs else call.args)

    def forward() -> Any:
        with ExitStack() as stack:
            for device, dtype in call.autocast:
                context: AbstractContextManager[Any] = torch.autocast(device, dtype=dtype)
                stack.enter_context(context)
            output = module(*call.args, **call.kwargs)
            return output if loss_of is None else loss_of(output)

    was_training = module.training
    module.train(call.training)
    try:
        if loss_of is not None:
            trace_forward_and_backward(tracer, forward)
        else:
            trace_forward_and_backward(
                tracer,
                forward,
                lambda output: _backward(module, tracer, call, output, is_distributed),
            )
    finally:
        module.train(was_training)
    return tracer.finding


def _backward(
    module: nn.Module, tracer: Tracer, call: _Call, output: Any, is_distributed: bool
) -> None:
    """The backward pass from the model's outputs."""
    tensors = dict(enumerate(tensor for _, tensor in tensors_of(output)))
    places = [place for place in call.gradients if place in tensors]
    outputs = [tensors[place] for place in places]
    gradients = [call.gradients[place] for place in places]
    with torch._C._DisableTorchDispatch():
        for tensor in outputs:
            if not tensor.dim():
                tracer.check_loss(tensor)
        if tracer.finding is not None:
            return
        bad = [gradient for gradient in gradients if not all_finite([gradient])]
        if bad:
            for tensor in outputs:
                tracer.check_loss(tensor)
            if tracer.finding is None and all_finite(list(call.sums.values())):
                tracer.finding = found("loss", "", "the model's output", bad[0])
            # Otherwise the step's own outputs were not finite, and the rerun's are.
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


def _keeper(call: _Call, place: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        call.gradients[place] = gradient.detach()

    return keep


def _saved(call: _Call) -> dict[str, Any]:
    """A call as tensors and plain values."""
    return {
        "args": with_plain_values(call.args),
        "kwargs": with_plain_values(call.kwargs),
        "buffers": dict(call.buffers),
        "rng": call.rng,
        "cuda_rng": call.cuda_rng,
        "autocast": [list(entry) for entry in call.autocast],
        "training": call.training,
        "gradients": dict(call.gradients),
        "sums": dict(call.sums),
    }


def loaded(saved: dict[str, Any]) -> _Call:
    """The call in a saved incident."""
    return _Call(
        args=tuple(saved["args"]),
        kwargs=dict(saved["kwargs"]),
        buffers=saved["buffers"],
        rng=saved["rng"],
        cuda_rng=saved["cuda_rng"],
        host_rng=raw_host_states(),
        autocast=tuple((device, dtype) for device, dtype in saved["autocast"]),
        training=saved["training"],
        gradients=saved["gradients"],
        sums=saved["sums"],
    )


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)


def _rank() -> int:
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_there else 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    on_nonfinite: str = "skip",
    folder: str | Path = "incidents",
    loss_of: LossOf | None = None,
    say: Callable[[str], None] = _to_stderr,
) -> Watch:
    """Watches every step: keeps non-finite gradients out of the weights, and explains the first.

    The loop stays as it is, and so do its numbers. Call it once for each model that is called on
    its own, such as generator and discriminator.

    Args:
        model: the module that the loop calls; the forward pass that is kept is `model(...)`.
        optimizer: the optimizer of its weights, or several. Not LBFGS, which computes the gradient
            several times a step. A skipped step leaves weights, optimizer state and buffers
            bitwise as they were, for every optimizer that leaves out parameters without a
            gradient, as all of torch's do.
        on_nonfinite: skip the step; raise FloatingPointError; stop: skip this and all later steps,
            and set `stopped`; warn: apply it.
        folder: the first non-finite step and the first spike are saved to <folder>/step-<n>/.
        loss_of: computes the loss from the model's output, so that the loss is examined too; it is
            called only after a failed step, when the loop's variables still hold its batch.
        say: shows one line.

    Returns:
        A handle with `incidents`, `summary()`, `stopped` and `close()`; also a context manager.

    Raises:
        TypeError: model or optimizer is of another type.
        ValueError: on_nonfinite is none of these, or the optimizer or model is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: is a {type(model).__name__}; must be a torch.nn.Module")
    optimizers: list[Any] = [optimizer]
    if isinstance(optimizer, list | tuple):
        optimizers = list(optimizer)
    for entry in optimizers:
        if not isinstance(entry, torch.optim.Optimizer):
            raise TypeError(f"optimizer: is a {type(entry).__name__}; must be a torch optimizer")
        if isinstance(entry, torch.optim.LBFGS):
            raise ValueError(
                "optimizer: LBFGS computes the gradient several times a step; use trace() instead"
            )
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite={on_nonfinite}: must be one of {', '.join(ON_NONFINITE)}")
    if any(
        type(inner).__name__.startswith(("FSDP", "FullyShardedData")) for inner in model.modules()
    ):
        raise ValueError(
            "model: is sharded (FSDP); no process holds all weights to run a step again"
        )
    return Watch(
        model,
        optimizers,
        on_nonfinite=on_nonfinite,
        folder=Path(folder),
        loss_of=loss_of,
        say=say,
    )
