"""What is kept of a module, and put back."""

import collections
import random
import warnings

import numpy as np
import torch
from torch import nn

from nonfinite.snapshot import (
    Snapshot,
    raw_host_states,
    same_host_states,
    set_raw_host_states,
    unsaved,
)


class Hoards(nn.Module):
    """State in every place that a module may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("small", torch.zeros(1, 1))
        self.register_buffer("gone", torch.zeros(2), persistent=False)
        self.register_buffer("late", None)
        self.register_buffer("overlapping", torch.zeros(1).expand(3))
        self.register_buffer("moved", torch.zeros(2))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.tensor, self.array = torch.zeros(3), np.zeros(2)
        self.half = torch.zeros(4)[1:3]
        self.list = [0, [torch.zeros(2)]]
        self.pair = ([1], {2})
        self.tables = {"a": {"b": 1}, "weights": [self.weight]}
        self.counts = collections.Counter(a=1)
        self.queue = collections.deque([1, 2], maxlen=2)
        self.number = 1
        self.list.append(self.list)

    def change(self) -> None:
        self.small, self.gone, self.late = torch.ones(4, 4), None, torch.ones(1)
        self.overlapping = torch.ones(3)
        self.moved.data = torch.ones(5)
        self.sparse.mul_(2)
        self.tensor += 1
        self.array += 1
        self.half.add_(1)
        self.list[1][0].fill_(7)
        self.list.insert(0, 3)
        self.pair[0].clear()
        self.pair[1].add(9)
        self.tables["a"]["b"] = 2
        self.tables["c"] = 3
        self.counts["a"] += 1
        self.queue.append(3)
        self.number += 1
        self.made = [1]


def test_all_is_as_it_was_and_the_same_object():
    module = Hoards()
    objects = {**module._buffers, **vars(module)}
    contents = Snapshot(module)
    module.change()
    contents.restore()
    for name, value in objects.items():
        assert {**module._buffers, **vars(module)}[name] is value, name
    assert module.small.shape == (1, 1) and module.moved.shape == (2,)
    for tensor in (module.small, module.gone, module.overlapping, module.moved, module.tensor):
        assert not tensor.any()
    assert not module.half.any() and not module.array.any()
    assert torch.equal(module.sparse.to_dense(), torch.eye(2))
    number, (inner,), itself = module.list
    assert number == 0 and not inner.any() and itself is module.list
    assert module.pair == ([1], {2})
    assert module.tables["a"] == {"b": 1} and list(module.tables) == ["a", "weights"]
    assert module.counts == {"a": 1} and list(module.queue) == [1, 2]
    assert module.number == 1


def test_memory_that_nobody_may_write_to_is_left_alone(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(4))
    module = nn.Module()
    module.array = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    with warnings.catch_warnings(action="ignore"):
        module.tensor = torch.from_numpy(module.array)
    Snapshot(module).restore()
    assert module.tensor.tolist() == [0, 1, 2, 3]


def test_a_buffer_that_has_no_content_yet_has_none_to_put_back():
    module = nn.LazyBatchNorm1d()
    contents = Snapshot(module)
    module(torch.ones(2, 3))
    contents.restore()
    assert module.running_mean.shape == (3,)


def test_what_is_made_anew_stays_and_weights_are_left_alone():
    module = Hoards()
    contents = Snapshot(module)
    module.change()
    with torch.no_grad():
        module.weight.add_(1)
    contents.restore()
    assert module.made == [1]
    assert module.weight.tolist() == [2.0, 2.0]


def test_what_a_state_dict_holds_is_not_among_what_is_unsaved():
    module = Hoards()
    module.list.pop()
    before = unsaved(module)
    with torch.no_grad():
        module.weight.add_(1)
        module.small.add_(1)
    assert unsaved(module) == before
    module.gone.add_(1)
    module.tables["a"]["b"] = 2
    after = unsaved(module)
    assert [name for name in after if after[name] != before[name]] == ["gone", "tables"]


def test_a_generator_that_was_used_has_another_state():
    states = raw_host_states()
    assert same_host_states(states)
    random.random()
    assert not same_host_states(states)
    set_raw_host_states(states)
    assert same_host_states(states)
    np.random.rand()
    assert not same_host_states(states)
    set_raw_host_states(states)
