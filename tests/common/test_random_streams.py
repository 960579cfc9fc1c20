import random

import numpy as np
import torch

from nonfinite.snapshot import host_states, set_host_states
from src.common.random_streams import seed_global
from src.external.load_target import seeded


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]


def test_one_seed_sets_every_global_generator():
    drawn = []
    for seed in (2**62, 2**62, 1):
        seed_global(seed)
        drawn.append([*draw(), torch.rand(()).item()])
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_states_are_plain_values_and_put_the_generators_back(tmp_path):
    draw()
    torch.save(host_states(), tmp_path / "states.pt")
    first = draw()
    set_host_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == first


def test_what_is_drawn_inside_a_seed_leaves_no_trace():
    seed_global(0)
    expected = [*draw(), torch.rand(()).item()]
    seed_global(0)
    with seeded(5):
        inside = draw()
        torch.rand(3)
    assert [*draw(), torch.rand(()).item()] == expected
    assert inside[:1] != expected[:1]
