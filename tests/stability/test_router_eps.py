import pytest

from src.common.errors import InputError
from src.config.compose import compose
from tests.runs import record
from tests.stability.harnessed import START, figure, first_difference, runs

FAILING = (
    "ffn=moe_writeup_add",
    "recipe.precision=32-true",
    # T* = 88.72 * 7 / (rate * (2 - 1)) is step 15.5; so coarse a bias may need some more.
    "model.sizes.writeup_bias_rate=40.0",
)


def test_router_eps_averts_a_failure_that_comes_after_its_start(tiny):
    plain, treated = runs(tiny, "router_eps", *FAILING)
    assert first_difference(plain, treated) > START
    assert START < record(plain)["guard"]["first_nonfinite_step"] <= 22
    assert record(treated)["guard"]["first_nonfinite_step"] is None
    active = figure(treated, "stability/router_eps_active")
    assert (active[START], active[START + 1]) == (0.0, 1.0)


def test_it_needs_a_router():
    with pytest.raises(InputError, match=r"router_eps: needs ffn.router, which ffn=mlp lacks"):
        compose("train", ["stability=router_eps", "ffn=mlp"])
