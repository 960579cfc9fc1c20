import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from tests.builders import DIMS, gqa_config, moe_config, router_config, transformer
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

RATE = 0.25


def router(**changes):
    values = {"bias_rate": RATE, "bias_center": True} | changes
    return moe_config(router=router_config(**values)).build(DIMS).router


def torchtitans(bias_E, counts_E):
    """The rule of its optimizer hook."""
    counts_E = counts_E.float()
    change_E = RATE * torch.sign(counts_E.mean() - counts_E)
    return bias_E + change_E - change_E.mean()


def test_the_rule_is_that_of_torchtitan():
    made, expected = router(), torch.zeros(5)
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        counts_E = torch.randint(1, 40, (5,), generator=draw)
        made.counts_E.copy_(counts_E)
        made.finish_step(applied=True)
        expected = torchtitans(expected, counts_E)
        torch.testing.assert_close(made.bias_E, expected, rtol=0, atol=1e-6)
    assert made.bias_E.abs().max() > RATE
    assert abs(float(made.bias_E.mean())) < 1e-6


def test_what_it_took_out_is_the_mean():
    made = router(bias_trainable=True)
    with torch.no_grad():
        made.bias_E.fill_(3.0)
    made.counts_E.copy_(torch.tensor([5, 5, 5, 5, 5]))
    made.finish_step(applied=True)
    # Loads are on target, so that the whole change is that of the training.
    assert float(made.removed_mean) == 3.0
    assert torch.equal(made.bias_E.detach(), torch.zeros(5))
    off = router(bias_center=False)
    off.counts_E.copy_(torch.tensor([9, 1, 1, 1, 1]))
    off.finish_step(applied=True)
    assert off.removed_mean is None
    torch.testing.assert_close(off.bias_E, RATE * torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0]))


def test_it_stops_the_drift_of_the_write_ups_router(tiny):
    plain, treated = runs(tiny, "router_center", "ffn=moe_writeup_add")
    assert first_difference(plain, treated) <= 2
    drift, mean = (figure(folder, "moe/layer_0/bias_mean") for folder in (plain, treated))
    assert abs(drift[22]) > 1
    assert all(abs(value) < 1e-3 for value in mean.values())
    removed = figure(treated, "stability/router_center_removed")
    assert len(removed) == 22 and min(removed.values()) > 0
    assert figure(plain, "stability/router_center_removed") == {}


def test_where_the_bias_is_centred_already_it_says_that_it_changes_nothing():
    (note,) = compose("train", ["ffn=moe", "stability=router_center"]).notes
    assert "ffn.router.bias_center is True already" in note
    assert compose("train", ["ffn=moe_writeup", "stability=router_center"]).notes == []


def test_it_counts_steps_and_leaves_out_those_that_are_skipped():
    router = router_config(bias_center=True, bias_rate=RATE)
    model = transformer(attention=gqa_config(), ffn=moe_config(router=router), max_seq_len=8)
    poison = Poison({2}, what="loss")
    run = Harness(recipe=recipe_config(accumulate=3), callbacks=[poison], model=model).fit()
    name = "model.layers.0.ffn.router.bias_E"
    # One state for each of the three micro-batches of a step.
    biases = [state["weights"][name] for state in run.states]
    for step, (first, last) in enumerate(zip(biases[::3], biases[1::3], strict=True), start=1):
        assert torch.equal(first, last), step
    ends = biases[2::3]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    assert all(abs(float(bias.mean())) < 1e-6 and bias.isfinite().all() for bias in biases)


def test_it_needs_a_router_with_a_bias():
    with pytest.raises(InputError, match=r"needs ffn.router.bias_center, which ffn=mlp lacks"):
        compose("train", ["ffn=mlp", "stability=router_center"])
    with pytest.raises(InputError, match=r"^ffn.router.balance=aux: stability=router_center needs"):
        compose("train", ["ffn=moe", "ffn.router.balance=aux", "stability=router_center"])
