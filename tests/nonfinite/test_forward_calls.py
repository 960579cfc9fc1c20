"""A kept forward pass, run again on a copy of the model, as after a step on a GPU."""

import copy

import torch
from torch import nn

from nonfinite import watch
from nonfinite.forward_calls import ForwardCall
from nonfinite.tracer import Tracer


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.inner(x) / scale


def test_a_copy_on_the_cpu_gives_the_same_finding(tmp_path):
    torch.manual_seed(0)
    model = Scales()
    optimizer = torch.optim.SGD(model.parameters())
    handle = watch(model, optimizer, folder=tmp_path, say=lambda line: None)
    model(torch.randn(2, 4), scale=torch.zeros(())).mean().backward()
    optimizer.step()
    replica = copy.deepcopy(model)
    (call,) = handle._calls
    finding = handle._pass(call, [call])(replica, Tracer(replica))
    assert finding.mechanism == "division by zero"
    assert finding.digest == handle.incidents[0]["finding"]["digest"]
    moved = call.on_cpu()
    assert isinstance(moved, ForwardCall)
    assert torch.equal(moved.args[0], call.args[0])
    assert moved.kwargs.keys() == {"scale"}
    assert moved.gradients.keys() == call.gradients.keys()
