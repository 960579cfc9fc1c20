import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nonfinite.tracer import trace


class Small(nn.Module):
    """Two named parts, in one of which something can be planted."""

    def __init__(self, plant: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.plant = nn.Linear(4, 4), nn.Linear(4, 1), plant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.plant == "log":
            y = (y - y).log() * 0 + y
        if self.plant == "sqrt":
            y = y + (y - y).sqrt()
        if self.plant == "mask":
            mask = torch.zeros(4).masked_fill(torch.tensor([True, False, False, False]), -math.inf)
            y = (y + mask).softmax(dim=-1)
        return self.second(y)


def run(model: nn.Module, x: torch.Tensor | None = None):
    batch = torch.ones(3, 4) if x is None else x
    return trace(model, lambda: model(batch).square().mean())


def test_a_sound_step_has_no_finding_and_leaves_its_gradients():
    model = Small()
    assert run(model) is None
    assert model.first.weight.grad is not None


def test_the_first_operation_is_named_not_what_it_spoils():
    finding = run(Small("log"))
    assert (finding.phase, finding.module) == ("forward", "")
    assert finding.operation.endswith("log")
    assert (finding.num_nonfinite, finding.num_elements) == (12, 12)
    assert finding.positions[:2] == [[0, 0], [0, 1]]
    assert finding.input_absmax == 0.0


def test_a_gradient_that_is_made_in_the_backward_pass_is_named_there():
    finding = run(Small("sqrt"))
    assert finding.phase == "backward"
    assert finding.operation.startswith("Sqrt")


def test_infinities_of_a_mask_are_no_finding_by_themselves():
    # The sum with the mask is infinite on purpose, and what softmax makes of it is finite; a mask
    # that is added shows, because addition is no masking operation.
    finding = run(Small("mask"))
    assert finding is None or finding.operation.endswith("add")


def test_a_weight_that_is_not_finite_comes_first():
    model = Small("log")
    with torch.no_grad():
        model.second.bias[0] = math.inf
    finding = run(model)
    assert (finding.phase, finding.module, finding.operation) == ("weights", "second", "bias")


def test_a_gradient_that_a_hook_spoils_belongs_to_its_parameter():
    model = Small()
    model.first.weight.register_hook(lambda gradient: gradient * math.nan)
    finding = run(model)
    assert (finding.phase, finding.module) == ("backward", "first")
    assert "weight" in finding.operation


def test_a_product_that_overflows_belongs_to_its_module():
    model = Small()
    with torch.no_grad():
        model.second.weight.fill_(1e30)
        model.first.weight.fill_(1e30)
    finding = run(model)
    assert finding.phase == "forward"
    assert finding.module == "second"
    assert finding.operation.endswith("linear")
    assert finding.input_absmax > 1e29


def test_the_digest_is_that_of_the_tensor():
    assert run(Small("log")).digest == run(Small("log")).digest
    other = run(Small("log"), torch.ones(2, 4))
    assert other.digest != run(Small("log")).digest


NAN = math.nan
OUTSIDE = torch.from_numpy(np.full(4, NAN, dtype=np.float32))


def assigned(y):
    y = y.clone()
    y[0, 0] = NAN
    return y


def assigned_below_the_graph(y):
    y.data[0, 0] = NAN
    return y


def filled_fresh_memory(y):
    return y + torch.empty(4).fill_(NAN)


PUT = {
    "__setitem__": assigned,
    "torch.Tensor.__setitem__": assigned_below_the_graph,
    "masked_fill": lambda y: y.masked_fill(y == y, NAN),
    "where": lambda y: torch.where(y == y, NAN, y),
    "full": lambda y: y + torch.full((4,), NAN),
    "full_like": lambda y: y + torch.full_like(y, NAN),
    "tensor": lambda y: y + torch.tensor(NAN),
    "fill_": filled_fresh_memory,
    "input of torch.Tensor.add": lambda y: y + OUTSIDE,
}


@pytest.mark.parametrize("operation", PUT)
def test_a_nan_that_is_put_into_the_pass_is_named_where_it_comes_in(operation):
    model = Small()
    model.first.register_forward_hook(lambda module, args, y: PUT[operation](y))
    finding = run(model)
    assert (finding.phase, finding.module) == ("forward", "first")
    assert finding.operation.endswith(operation)
    assert finding.num_nonfinite > 0


def test_a_nan_that_is_read_by_nobody_is_no_finding():
    def loss_of(planted=False):
        torch.full((3,), NAN)
        y = model.first(torch.ones(3, 4))
        y.detach().masked_fill(y > 0, NAN).nanmean()
        return (y.log() * 0 + y if planted else y).square().mean()

    model = Small()
    assert trace(model, loss_of) is None
    with torch.no_grad():
        model.first.bias.fill_(-9)
    assert trace(model, lambda: loss_of(planted=True)).operation == "torch.Tensor.log"


def test_what_fresh_memory_held_before_it_was_written_is_no_finding():
    def fresh(y):
        memory = torch.empty(4)
        memory.numpy()[:] = NAN
        memory[0] = 1.0
        return memory.copy_(y[0]).expand_as(y)

    model = Small()
    model.first.register_forward_hook(lambda module, args, y: fresh(y))
    assert run(model) is None


def loss_on(model, batch):
    return trace(model, lambda: model(batch[0]).tanh().mean(), batch=batch)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_batch_that_is_not_finite_is_the_finding_itself(value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    finding = loss_on(Small(), [x, torch.zeros(3)])
    assert (finding.phase, finding.operation) == ("batch", "batch[0]")
    assert (finding.positions, finding.num_nonfinite) == ([[1, 2]], 1)


def test_what_a_step_leaves_out_of_its_batch_or_takes_for_a_mask_is_no_finding():
    x, rest = torch.ones(3, 4), torch.tensor([NAN, 1.0])
    mask = torch.full((3, 3), -math.inf).triu(1)
    batch = [x, rest, mask]
    assert loss_on(Small(), batch) is None
    assert loss_on(Small("log"), batch).operation == "torch.Tensor.log"
    masked = [mask.softmax(-1) @ x, mask]
    spoilt = loss_on(Small("sqrt"), masked)
    assert spoilt.phase == "backward"


def test_a_loss_that_is_not_finite_is_never_without_a_finding():
    model = Small()
    # An infinity of a mask that comes through to the loss.
    mask = torch.full((3, 1), -math.inf)
    finding = trace(model, lambda: (model(torch.ones(3, 4)) + mask).mean())
    assert (finding.phase, finding.module) == ("forward", "")
    assert finding.operation == "input of torch.Tensor.add"


def test_infinities_of_a_frozen_parameter_may_be_a_mask_and_a_nan_is_none():
    model = Small()
    mask = torch.full((4, 4), -math.inf).triu(1)
    model.mask = nn.Parameter(mask, requires_grad=False)
    assert run(model) is None
    with torch.no_grad():
        model.mask[0, 0] = NAN
    finding = run(model)
    assert (finding.phase, finding.operation) == ("weights", "mask")


@pytest.mark.parametrize("operation", [F.softmax, F.log_softmax])
def test_hooks_are_gone_afterwards(operation):
    model = Small("log")
    run(model)
    assert not model._forward_hooks
    assert not model.first._forward_pre_hooks
    assert operation(model(torch.ones(1, 4)), dim=-1) is not None
