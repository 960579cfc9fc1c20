"""Runs a model on its inputs, forward and backward, in one precision, as often as an audit asks."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nonfinite.batch_tensors import tensors_of
from nonfinite.finding import Finding
from nonfinite.finite_checks import all_finite
from nonfinite.tracer import Tracer, trace_forward_and_backward

Values = dict[str, Tensor]
"""Weights and buffers by name."""


class Passes:
    """A copy of a model in one dtype, which is the same again after each pass.

    Args:
        model: the model; it is copied and not changed.
        dtype: that of the copy's weights, and of floating-point inputs.
        mixed: whether weights and inputs stay as they are, and operations run under autocast.

    Raises:
        ValueError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, mixed: bool = False) -> None:
        try:
            copied = copy.deepcopy(model)
        except Exception as error:  # a user's model may fail in any way
            raise ValueError(f"the model cannot be copied ({error})") from error
        self.autocast = dtype if mixed and dtype != torch.float32 else None
        self.dtype = torch.float32 if mixed else dtype
        self.model = copied.to(self.dtype)
        for parameter in self.model.parameters():
            parameter.grad = None
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.tensors = dict(named)
        self._base = {name: tensor.detach().clone() for name, tensor in named}

    def put(self, values: Values) -> None:
        """Sets weights and buffers, in this dtype."""
        with torch.no_grad():
            for name, value in values.items():
                self.tensors[name].copy_(value)

    def reset(self) -> None:
        """Puts all weights and buffers back, and removes gradients."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(self._base[name])
        for parameter in self.model.parameters():
            parameter.grad = None

    def digests(self) -> dict[str, str]:
        """A hash of the values of each weight and buffer, by name."""
        return {
            name: hashlib.sha256(
                tensor.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name, tensor in ((n, t.cpu().reshape(-1)) for n, t in self._base.items())
        }

    def cast(self, inputs: Any) -> Any:
        """Inputs in this dtype."""

        def leaf(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(self.dtype) if is_float else value

        return tree_map(leaf, inputs)

    def loss(self, inputs: Any) -> Tensor | None:
        """Runs the model; returns what is differentiated, or None if nothing is."""
        torch.manual_seed(0)
        if self.autocast is None:
            return total(called(self.model, inputs))
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        with torch.autocast(device, dtype=self.autocast):
            output = called(self.model, inputs)
        return total(output)

    def fails(self, values: Values, inputs: Any) -> bool | None:
        """Whether loss or a gradient is not finite; None if the model refuses the inputs."""
        try:
            self.put(values)
            loss = self.loss(self.cast(inputs))
            if loss is None:
                return False
            if not all_finite([loss]):
                return True
            if loss.requires_grad:
                loss.backward()
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            return not all_finite(gradients)
        except Exception:  # a user's model may refuse a changed input in any way
            return None
        finally:
            self.reset()

    def traced(self, values: Values, inputs: Any, tracer: Tracer | None = None) -> Finding | None:
        """The finding of a pass with these weights and inputs; see `nonfinite.trace`.

        Raises:
            Exception: whatever the model raises.
        """
        tracer = tracer or Tracer(self.model)

        def backward(loss: Tensor | None) -> None:
            if loss is None:
                return
            with torch._C._DisableTorchDispatch():
                tracer.check_loss(loss)
            if tracer.finding is None and loss.requires_grad:
                loss.backward()
                with torch._C._DisableTorchDispatch():
                    tracer.check_gradients()

        try:
            self.put(values)
            given = self.cast(inputs)
            trace_forward_and_backward(tracer, lambda: self.loss(given), backward)
        finally:
            self.reset()
        return tracer.finding


def called(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a mapping as keyword arguments, a tuple or list as arguments, or one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def total(output: Any) -> Tensor | None:
    """The loss that a model returned, or a number that depends on all of its outputs.

    The sum of all outputs with fixed random signs, divided by their number, is no limit of its own.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    pairs = [("", output)] if isinstance(output, Tensor) else tensors_of(output)
    tensors = [t for _, t in pairs if t.is_floating_point() and t.numel()]
    tensors = [t for t in tensors if t.requires_grad] or tensors
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    generator = torch.Generator().manual_seed(0)
    parts = []
    for tensor in tensors:
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
        parts.append((tensor.float() * signs / tensor.numel()).sum())
    return torch.stack(parts).sum() if parts else None
