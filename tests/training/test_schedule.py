import math

import pytest

from src.training.schedule import SCHEDULES

AT = {
    # step: factor, for 10 warm-up steps of 110
    "constant": {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 109: 1.0},
    "linear": {0: 0.1, 10: 1.0, 60: 0.5, 109: 0.01},
    "cosine": {0: 0.1, 10: 1.0, 60: 0.5, 35: 0.5 * (1 + math.cos(math.pi / 4))},
    "wsd": {0: 0.1, 10: 1.0, 88: 1.0, 99: 0.5, 109: 1 / 22},
}


def test_every_schedule_has_its_figures_here():
    assert AT.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", AT)
def test_factors(name):
    for step, factor in AT[name].items():
        assert SCHEDULES[name](step, warmup_steps=10, max_steps=110) == pytest.approx(factor)


@pytest.mark.parametrize("name", AT)
def test_without_warm_up_the_first_step_is_whole_and_the_end_is_never_passed(name):
    assert SCHEDULES[name](0, warmup_steps=0, max_steps=100) == 1.0
    assert SCHEDULES[name](200, warmup_steps=0, max_steps=100) in (0.0, 1.0)
