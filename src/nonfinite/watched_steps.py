"""The object behind `watch`: hooks on a model and its optimizers.

Hooks on the model keep the inputs of each forward pass and the gradient that comes back to its
outputs; hooks on the optimizer look at the gradient before it is applied. If it is not finite, the
passes are run again under the tracer, from the same state.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from nonfinite.buffers import BufferCopies, Copies, put_back
from nonfinite.builders import with_name
from nonfinite.causes import Evidence
from nonfinite.closing_line import Counted
from nonfinite.finding import Finding
from nonfinite.forward_calls import ForwardCall, LossOf, guilty_row_of, run_call, why_finite
from nonfinite.incident_files import new_folder
from nonfinite.left_out_steps import LeftOutSteps
from nonfinite.loop_hooks import Hook, is_ddp_module, is_one_of_several, writes_here
from nonfinite.recording import (
    COMPILED,
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
from nonfinite.rerun import undisturbed
from nonfinite.snapshot import raw_host_states, same_host_states
from nonfinite.spike_rule import RecentNorms
from nonfinite.tracer import Tracer
from nonfinite.update_check import UpdateCheck, UpdateFault, gradient_norm, names_of

ON_NONFINITE = ("skip", "raise", "stop", "warn")

MAX_CALLS = 512
"""Forward passes of one step whose inputs are kept."""

RING = 256
"""Last steps whose gradient norms are kept."""

COMMAND = "python -m nonfinite {folder} --model {model}"

_watched: WeakSet[torch.optim.Optimizer] = WeakSet()
"""Optimizers with hooks; a model that is no longer used must not be kept for them."""


def is_watched_already(optimizer: torch.optim.Optimizer) -> bool:
    """Whether another watch has hooks on an optimizer."""
    return optimizer in _watched


class Watch(Counted):
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
        super().__init__(say)
        self.model = model
        inner: Any = model.module if is_ddp_module(model) else model
        # Of a compiled model, the eager one is run again.
        self.root: nn.Module = getattr(inner, "_orig_mod", inner)
        self.optimizers = list(optimizers)
        self.on_nonfinite, self.folder = on_nonfinite, folder
        self.loss_of, self.stopped = loss_of, False
        # Walking through the modules at each step would take longer than all checks.
        self._modules, self._parameters = list(self.root.modules()), list(self.root.parameters())
        self._updates = {id(o): UpdateCheck(o, names_of(self.root)) for o in optimizers}
        self._calls: deque[ForwardCall] = deque(maxlen=MAX_CALLS)
        self._buffers = BufferCopies(self.root)
        self._before_step: Copies = self._buffers.current()
        self._stepped: set[int] = set()
        """Optimizers that have made the present step."""
        self._is_called = False
        """Whether the present step began with a call of the model itself, not of a method."""
        self._copies_are_old = False
        self._sound = True
        self._left_out = LeftOutSteps(self._parameters)
        self._num_calls, self._uses_host_rng = 0, False
        self._training: tuple[bool, ...] = self._modes()
        self._is_rerun = False
        self._is_one_of_several = is_one_of_several(model)
        self._ring: deque[dict[str, float]] = deque(maxlen=RING)
        self._norms = RecentNorms()
        before, after = Hook(self._before), Hook(self._after)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            self._handles.append(optimizer.register_step_post_hook(self._after_update))
            _watched.add(optimizer)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Removes all hooks, and says how many steps were not finite."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            _watched.discard(optimizer)
        self._handles.clear()
        self._calls.clear()
        self.say_closing_line()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the inputs and the state of a forward pass that may be differentiated."""
        if self._is_rerun or not torch.is_grad_enabled():
            return
        if self._left_out.passes:
            # Recorded here, because a hook of the backward pass cannot run another one.
            self._count_left_out(self._left_out.passes)
            self._left_out.passes = []
        # A GradScaler may leave out a step; then its gradients are gone, and so are its passes.
        is_left_out = not self._stepped and self._left_out.are_gradients_gone(self._calls)
        # A discriminator's gradients are also dropped, without a step, after the generator's.
        if is_left_out and any(not call.came_back_finite for call in self._calls):
            self._count_left_out(list(self._calls))
        buffers = self._buffers.current()
        if self._stepped or is_left_out or not self._calls:
            self._calls.clear()
            self._stepped.clear()
            self._before_step = buffers
        self._num_calls += 1
        # What takes long is read in the first passes, and in some later ones.
        looks_closely = self._num_calls <= 8 or self._num_calls % 64 == 0
        if looks_closely or self.root.training is not self._training[0]:
            self._training = self._modes()
        host_rng = raw_host_states() if looks_closely or self._uses_host_rng else None
        self._calls.append(ForwardCall.of(self._training, args, kwargs, buffers, host_rng))

    def _modes(self) -> tuple[bool, ...]:
        return tuple([module.training for module in self._modules])

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Registers hooks that keep the gradient coming back to each output."""
        if not self._is_rerun and torch.is_grad_enabled() and self._calls:
            call = self._calls[-1]
            call.follow(output, self._leave_out)
            if call.host_rng is not None and not self._uses_host_rng:
                self._uses_host_rng = not same_host_states(call.host_rng)

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
        """Decides what happens to a step: once, for all optimizers that take part in it.

        Raises:
            FloatingPointError: it is not finite and `on_nonfinite` is raise.
        """
        if self._stepped and id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
            if not self._sound and self.on_nonfinite != "warn":
                self._drop(optimizer)
            return
        was_called, self._is_called = self._is_called, bool(self._calls) and not self._stepped
        self._copies_are_old = was_called and not self._is_called
        self._stepped = {id(optimizer)}
        self.step += 1
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            # A fused optimizer leaves out the steps in which a GradScaler found an overflow.
            self._sound = False
            return
        self._left_out.end()
        norm = gradient_norm(self.optimizers)
        finite = norm - norm == 0.0 and (not self._is_called or self._losses_were_finite())
        fault = self._updates[id(optimizer)].rate_fault() if finite else None
        self._sound = finite and fault is None
        if self._sound:
            self._look_for_spike(norm)
            if self.stopped:
                self._drop(optimizer)
                self.skipped_after_stop += 1
            return
        self.nonfinite_steps.append(self.step)
        self._record(fault)
        if self.on_nonfinite == "warn":
            self.applied += 1
            return
        self._drop(optimizer)
        if self.on_nonfinite == "raise":
            self.raised += 1
            raise FloatingPointError(self._what())
        self.skipped += 1
        self.stopped = self.stopped or self.on_nonfinite == "stop"

    def _losses_were_finite(self) -> bool:
        """Whether the losses that the model returned were finite.

        A derivative of 0, such as that of ReLU, can hide a NaN loss from every gradient. Processes
        that train together must agree on each step, and have only the gradient in common.
        """
        return self._is_one_of_several or all(call.loss_was_finite for call in self._calls)

    def _look_for_spike(self, norm: float) -> None:
        if self._norms.is_spike(norm):
            self._record(None, norm=norm)
        self._ring.append({"step": self.step, "grad_norm": norm})

    def _leave_out(self, call: ForwardCall) -> None:
        if not self._stepped and self._left_out.drop_earlier(self._calls, call):
            self._before_step = call.buffers

    def _count_left_out(self, calls: Sequence[ForwardCall]) -> None:
        self.step += 1
        at_fault = self._left_out.count(self.step)
        self.nonfinite_steps.extend(at_fault)
        if at_fault:
            self._record(None, calls=calls)

    def _drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves an optimizer nothing to apply, and puts the buffers back."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        put_back(self.root, self._before_step, only_damaged=self._copies_are_old)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Looks at the weights where the optimizer could have divided by 0."""
        fault = self._updates[id(optimizer)].applied_fault(gradients=False) if self._sound else None
        if not self._is_called:
            # If only methods of the model are called, the next step begins here.
            self._before_step = self._buffers.current()
        if fault is None:
            return
        self.nonfinite_steps.append(self.step)
        self.applied += 1
        self._record(fault)
        if self.on_nonfinite == "raise":
            raise FloatingPointError(self._what())
        self.stopped = self.stopped or self.on_nonfinite == "stop"

    def _record(
        self,
        fault: UpdateFault | None,
        *,
        norm: float | None = None,
        calls: Sequence[ForwardCall] | None = None,
    ) -> None:
        """Records the first incident of a kind; an error in doing so never stops the loop."""
        kind = "non-finite" if norm is None else "spike"
        if self._has(kind) or self._is_muted:
            return
        calls = [call for call in (self._calls if calls is None else calls) if call.gradients]
        modes = self._modes()
        for call in calls:
            # A part may have changed its mode since the modes were read.
            call.training = modes if call.training[0] is modes[0] else call.training
        # The call whose output was not finite explains the gradients of the others.
        calls.sort(key=lambda call: call.was_finite)
        remarks: list[str] = []
        try:
            rerun = self._rerun(calls, fault, measures_growth=norm is not None)
            is_writer = writes_here(rerun.finding is not None, is_ddp=is_ddp_module(self.model))
            if norm is None:
                incident = self._incident(rerun, calls, fault)
            else:
                gradients = largest_gradients(self.root)
                row = self._guilty_row(calls) if is_writer else None
                incident = make_spike(self.step, norm, rerun, row=row, largest_gradients=gradients)
            if is_writer:
                remarks = self._save(incident, calls, can_rerun=fault is None and norm is None)
        except Exception as error:
            incident, is_writer = unrecorded(self.step, kind, error), True
        self.incidents.append(incident)
        if is_writer:
            for line in [*lines_of(incident), *remarks]:
                self.say(line)

    def _rerun(
        self, calls: Sequence[ForwardCall], fault: UpdateFault | None, *, measures_growth: bool
    ) -> Rerun:
        if fault is not None:
            return Rerun(router={})
        if not calls:
            return Rerun(
                router={},
                why_finite="No gradient came back through model(...), so nothing was run again:"
                " watch the module that your loop calls.",
            )
        self._is_rerun = True
        try:
            passes = [self._pass(call, calls) for call in calls]
            rerun = run_again(self.root, passes, measures_growth=measures_growth)
        finally:
            self._is_rerun = False
        is_bad_batch = rerun.finding is not None and rerun.finding.phase == "batch"
        if any(call.inputs_changed for call in calls) and (rerun.finding is None or is_bad_batch):
            return Rerun(
                router={},
                why_finite="The step could not be run again: the inputs of model(...) were changed"
                " in place since then.",
            )
        return rerun

    def _guilty_row(self, calls: Sequence[ForwardCall]) -> dict[str, Any] | None:
        """The row of the batch that made a spike, in a step of one forward pass."""
        if len(calls) != 1 or calls[0].inputs_changed or is_ddp_module(self.model):
            return None
        self._is_rerun = True
        try:
            with undisturbed(self.root):
                return guilty_row_of(self.root, calls[0])
        finally:
            self._is_rerun = False

    def _incident(
        self, rerun: Rerun, calls: Sequence[ForwardCall], fault: UpdateFault | None
    ) -> dict[str, Any]:
        why = rerun.why_finite
        if rerun.reproduced is False and hasattr(self.model, "_orig_mod"):
            why = COMPILED
        elif rerun.reproduced is False and all(call.is_same for call in calls):
            why = why_finite(calls)
        evidence = Evidence(
            finding=rerun.finding,
            router=rerun.router,
            second_moment_finite=fault is not None
            or all(map(second_moment_finite, self.optimizers)),
            weight_absmax=weight_absmax(self.root),
            last={},
            update=fault,
            why_finite=why,
        )
        gradients = largest_gradients(self.root)
        return make_incident(self.step, evidence, rerun, largest_gradients=gradients)

    def _save(
        self, incident: dict[str, Any], calls: Sequence[ForwardCall], *, can_rerun: bool
    ) -> list[str]:
        folder = new_folder(self.folder, self.step)
        passes = [call.saved() for call in calls]
        state = {"state_dict": self.root.state_dict(), "calls": passes}
        # What the loop's own loss function found cannot be found without it.
        is_command = can_rerun and calls and self.loss_of is None
        command = with_name(COMMAND, self.root) if is_command else None
        return save(folder, incident, state, list(self._ring), command=command)

    def _pass(
        self, call: ForwardCall, calls: Sequence[ForwardCall]
    ) -> Callable[[nn.Module, Tracer], Finding | None]:
        # The loop's variables hold the targets of its last forward pass alone.
        is_last = any(call is kept[-1] for kept in (self._calls, self._left_out.passes) if kept)
        loss_of = self.loss_of if is_last else None
        all_were_finite = all(other.was_finite for other in calls)

        def run(module: nn.Module, tracer: Tracer) -> Finding | None:
            return run_call(
                module,
                tracer,
                call if module is self.root else call.on_cpu(),
                loss_of=loss_of,
                all_were_finite=all_were_finite,
                is_distributed=is_ddp_module(self.model),
            )

        return run
