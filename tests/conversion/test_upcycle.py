"""Experts out of a dense network."""

import pytest
import torch

from src.conversion.upcycle import check_upcycle, to_experts
from src.model.ffn.mlp import MLPConfig
from tests.builders import DIMS, moe_config, router_config

DENSE = 24


def dense():
    torch.manual_seed(0)
    return MLPConfig(inner_dim=DENSE).build(DIMS)


def upcycled(source, target, seed=0):
    weights = to_experts(
        source.state_dict(),
        target=target,
        init_std=0.5,
        generator=torch.Generator().manual_seed(seed),
    )
    module = target.build(DIMS)
    module.load_state_dict(weights)
    return module


CASES = {
    "whole": {"inner_dim": 24, "num_routed": 5, "num_shared": 0, "top_k": 2},
    "whole-shared": {"inner_dim": 24, "num_routed": 5, "num_shared": 1, "top_k": 2},
    "whole-shared-thrice": {"inner_dim": 24, "num_routed": 5, "num_shared": 3, "top_k": 1},
    "halves": {"inner_dim": 12, "num_routed": 6, "num_shared": 0, "top_k": 2},
    "halves-shared": {"inner_dim": 12, "num_routed": 6, "num_shared": 1, "top_k": 4},
    "thirds-shared-beyond": {"inner_dim": 8, "num_routed": 9, "num_shared": 4, "top_k": 6},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_the_function_is_kept(sizes, dispatch):
    source = dense()
    made = upcycled(source, moe_config(dispatch=dispatch, **sizes))
    x_BTD = torch.randn(2, 9, DIMS.hidden_dim)
    with torch.no_grad():
        # The same products in another order: roundings of float32 on values of order 0.1.
        torch.testing.assert_close(made(x_BTD), source(x_BTD), rtol=1e-5, atol=1e-6)
        picked = made.router(x_BTD.flatten(0, 1))[1]
    assert len(picked.unique()) > sizes["top_k"], "all tokens go one way: nothing is shown"


def test_the_writeups_router_keeps_it_too():
    source = dense()
    router = router_config(bias_use="multiply", norm_eps=0.0)
    made = upcycled(source, moe_config(router=router, **CASES["whole-shared"]))
    x_BTD = torch.randn(2, 9, DIMS.hidden_dim)
    torch.testing.assert_close(made(x_BTD), source(x_BTD), rtol=1e-5, atol=1e-6)


def test_every_weight_learns_and_experts_part():
    target = moe_config(**CASES["halves-shared"])
    made = upcycled(dense(), target)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    x_BTD = torch.randn(4, 32, DIMS.hidden_dim)
    for _ in range(3):
        optimizer.zero_grad()
        (made(x_BTD) - x_BTD).square().mean().backward()
        for name, parameter in made.named_parameters():
            assert (parameter.grad != 0).any(), name
        optimizer.step()
    # Experts 0 and 2 began as the same half.
    assert not torch.equal(made.experts.gate_proj[0], made.experts.gate_proj[2])


def test_the_router_is_drawn_from_its_own_stream():
    target = moe_config(**CASES["halves"])
    one, same, other = (upcycled(dense(), target, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.router.weight, same.router.weight)
    assert not torch.equal(one.router.weight, other.router.weight)
    assert torch.equal(one.router.weight[0], one.router.weight[1])
    assert not torch.equal(one.router.weight[0], one.router.weight[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_dim": 10}, "inner_dim=10: must divide the dense network's inner_dim=24"),
        ({"inner_dim": 48}, "inner_dim=48: must divide the dense network's inner_dim=24"),
        ({"inner_dim": 12, "num_routed": 5}, "num_routed=5: must be a multiple of 2"),
        ({"inner_dim": 12, "num_routed": 6, "top_k": 3}, "top_k=3: must be a multiple of 2"),
    ],
)
def test_what_cannot_be_done_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_upcycle(moe_config(**changes), dense_dim=DENSE)
