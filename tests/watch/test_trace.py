import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.watch.trace import trace


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


@pytest.mark.parametrize("operation", [F.softmax, F.log_softmax])
def test_hooks_are_gone_afterwards(operation):
    model = Small("log")
    run(model)
    assert not model._forward_hooks
    assert not model.first._forward_pre_hooks
    assert operation(model(torch.ones(1, 4)), dim=-1) is not None
