"""Latent attention out of grouped-query attention, layer by layer and as a whole model."""

from dataclasses import replace

import pytest
import torch

from src.conversion.latent import (
    InputMetric,
    check_latent,
    decompose,
    full_kv_rank,
    stretched_theta,
)
from src.model.rope import RotaryTable
from tests.builders import DIMS, gqa_config, mlha_config

SOURCE = gqa_config(rope_dim=8)
EVEN = InputMetric.identity(DIMS.hidden_dim)
TIME = 12


def layer(config=SOURCE, seed=0):
    torch.manual_seed(seed)
    return config.build(DIMS).eval()


def inputs(seed=1):
    return torch.randn(2, TIME, DIMS.hidden_dim, generator=torch.Generator().manual_seed(seed))


def target_config(*, source=SOURCE, **changes):
    rope_dim = changes.get("rope_dim", source.rope_dim)
    values = {
        "rope_dim": rope_dim,
        "q_latent_dim": DIMS.hidden_dim,
        "kv_latent_dim": full_kv_rank(source, rope_dim=rope_dim, dims=DIMS),
        "num_rope_keys": source.num_kv_heads,
    }
    return mlha_config(**(values | changes))


def converted(attention, target, *, source=SOURCE, rope_stride=1, metric=EVEN):
    weights = decompose(
        attention.state_dict(),
        source=source,
        dims=DIMS,
        rope_dim=target.rope_dim,
        num_rope_keys=target.num_rope_keys,
        rope_stride=rope_stride,
        metric=metric,
    ).weights(q_latent_dim=target.q_latent_dim, kv_latent_dim=target.kv_latent_dim)
    module = target.build(DIMS)
    module.load_state_dict(weights)
    return module.eval()


def output(attention, *, rope_dim, x=None, theta=10000.0):
    x = inputs() if x is None else x
    rope = RotaryTable(rope_dim=rope_dim, max_seq_len=TIME, theta=theta)(TIME)
    with torch.no_grad():
        return attention(x, rope)


def error(attention, target, *, x=None, rope_stride=1, **given):
    theta = stretched_theta(
        10000.0,
        source_dim=SOURCE.rope_dim,
        rope_dim=target.rope_dim,
        rope_stride=rope_stride,
    )
    made = converted(attention, target, rope_stride=rope_stride, **given)
    before = output(attention, rope_dim=SOURCE.rope_dim, x=x)
    after = output(made, rope_dim=target.rope_dim, x=x, theta=theta)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize(
    "source",
    [
        SOURCE,
        gqa_config(rope_dim=10),
        gqa_config(rope_dim=8, num_kv_heads=4),
        gqa_config(rope_dim=8, num_kv_heads=1),
    ],
    ids=["part-rotated", "all-rotated", "multi-head", "one-kv-head"],
)
def test_at_full_ranks_the_output_is_the_sources(source):
    attention = layer(source)
    made = converted(attention, target_config(source=source), source=source)
    before = output(attention, rope_dim=source.rope_dim)
    # Products of two factors instead of one matrix: a few roundings of float32 more.
    torch.testing.assert_close(output(made, rope_dim=source.rope_dim), before, rtol=1e-4, atol=1e-6)


def test_every_rank_less_costs_something_and_more_costs_more():
    attention = layer()
    full = full_kv_rank(SOURCE, rope_dim=8, dims=DIMS)
    found = [
        error(attention, target_config(kv_latent_dim=rank)) for rank in (full, full - 1, full // 2)
    ]
    assert found[0] < 1e-5 < found[1] < found[2]
    queries = [error(attention, target_config(q_latent_dim=rank)) for rank in (24, 23, 6)]
    assert queries[0] < 1e-5 < queries[1] < queries[2]


def test_a_pair_that_goes_on_rotating_turns_as_it_did():
    # Keys and queries that are nothing but the pairs which are kept.
    attention = layer()
    for stride in (1, 2):
        kept = [pair * stride for pair in range(2)]
        rows = torch.tensor([*kept, *(pair + 4 for pair in kept)])
        with torch.no_grad():
            for projection in (attention.q_proj, attention.k_proj):
                weight = torch.randn(projection.weight.shape).unflatten(0, (-1, DIMS.head_dim))
                only = torch.zeros_like(weight)
                only[:, rows] = weight[:, rows]
                projection.weight.copy_(only.flatten(0, 1))
        assert error(attention, target_config(rope_dim=4), rope_stride=stride) < 1e-5
        other = 3 - stride
        assert error(attention, target_config(rope_dim=4), rope_stride=other) > 1e-2


def test_rope_keys_that_differ_by_a_turn_and_a_size_are_shared_exactly():
    attention = layer()
    with torch.no_grad():
        heads = attention.k_proj.weight.unflatten(0, (2, DIMS.head_dim))
        first, second = heads[0, :4].clone(), heads[0, 4:8].clone()
        # The second head is the first times 2 e^(i 0.7), in each rotated pair.
        turn = torch.tensor(0.7)
        heads[1, :4] = 2 * (first * turn.cos() - second * turn.sin())
        heads[1, 4:8] = 2 * (second * turn.cos() + first * turn.sin())
        attention.k_proj.weight.copy_(heads.flatten(0, 1))
    assert error(attention, target_config(num_rope_keys=1)) < 1e-5
    assert error(layer(seed=3), target_config(num_rope_keys=1)) > 1e-2


def test_a_fit_to_the_inputs_loses_less_on_such_inputs():
    attention = layer()
    # Inputs that hardly vary in most directions.
    scale = torch.logspace(0, -3, DIMS.hidden_dim)
    mix = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5))).Q
    seen, new = ((inputs(seed) * scale) @ mix for seed in (1, 2))
    flat = seen.flatten(0, 1).double()
    metric = InputMetric.of(flat.T @ flat / len(flat))
    for change in ({"kv_latent_dim": 8}, {"q_latent_dim": 6}, {"num_rope_keys": 1}):
        target = target_config(**change)
        fitted = error(attention, target, x=new, metric=metric)
        assert fitted < error(attention, target, x=new), change
    assert error(attention, target_config(), x=new, metric=metric) < 1e-4


def test_the_size_of_the_inputs_changes_no_factor():
    attention = layer()
    flat = inputs().flatten(0, 1).double()
    target = target_config(kv_latent_dim=8, num_rope_keys=1)
    one, ten = (
        converted(attention, target, metric=InputMetric.of(x.T @ x / len(x))).state_dict()
        for x in (flat, flat * 10)
    )
    for name, weight in one.items():
        torch.testing.assert_close(ten[name], weight, rtol=1e-4, atol=1e-6)


def test_a_latent_beyond_the_rank_can_learn():
    source = gqa_config(rope_dim=10, num_kv_heads=1)
    made = converted(layer(source), target_config(source=source, kv_latent_dim=20), source=source)
    norms = made.kv_down.weight.norm(dim=1)
    assert (norms > 0.1 * norms.max()).all()
    assert (made.v_up.weight[:, 10:] == 0).all()
    output_BTD = made(inputs(), RotaryTable(rope_dim=10, max_seq_len=TIME, theta=1e4)(TIME))
    output_BTD.square().sum().backward()
    assert (made.v_up.weight.grad[:, 10:] != 0).any()


@pytest.mark.parametrize(
    ("source", "changes", "stride", "message"),
    [
        ({"qk_norm": True}, {}, 1, "the source has qk_norm"),
        ({}, {"rope_dim": 10}, 1, "rope_dim=10: must be at most 8"),
        ({"rope_dim": 10}, {"rope_dim": 8}, 2, "rope_dim=8: must be at most 6"),
        ({}, {"rope_dim": 6}, 2, "rope_dim=6: must be at most 4"),
        ({}, {"rope_dim": 4}, 0, "rope_stride=0: must be at least 1"),
        ({}, {"num_rope_keys": 4}, 1, "num_rope_keys=4: must divide the source's num_kv_heads=2"),
        ({}, {"kv_latent_dim": 25}, 1, "kv_latent_dim=25: must be at most hidden_dim=24"),
        ({}, {"q_latent_dim": 25}, 1, "q_latent_dim=25: must be at most hidden_dim=24"),
    ],
)
def test_what_cannot_be_done_is_named(source, changes, stride, message):
    before = replace(SOURCE, **source)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_latent(before, target_config(**changes), DIMS, rope_stride=stride)
