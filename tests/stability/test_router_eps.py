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


def test_router_eps20_has_the_epsilon_of_deepseek_v3_and_averts_the_failure_too(tiny):
    assert compose("train", ["stability=router_eps20"]).remedies["router_eps20"].eps == 1e-20
    # In float32, a sum of scores that has underflown to 0 is divided by 1e-20.
    plain, treated = runs(tiny, "router_eps20", *FAILING)
    assert record(plain)["guard"]["first_nonfinite_step"] is not None
    assert record(treated)["guard"]["first_nonfinite_step"] is None
    assert figure(treated, "stability/router_eps_active")[22] == 1.0


def test_two_epsilons_are_refused():
    with pytest.raises(InputError, match=r"router_eps20\]: both set ffn.router.norm_eps"):
        compose("train", ["stability=[router_eps,router_eps20]"])
