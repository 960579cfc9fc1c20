import torch

from tests.runs import record, weights
from tests.stability.harnessed import START, figure, first_difference, runs
from tests.stability.test_router_eps import FAILING


def test_router_freeze_keeps_the_bias_from_its_start_on(tiny):
    plain, treated = runs(tiny, "router_freeze")
    assert first_difference(plain, treated) > START
    means = figure(treated, "moe/layer_0/bias_absmax")
    assert len({means[step] for step in range(START, 23)}) == 1
    assert means[START] != means[START - 1]
    assert not torch.equal(
        weights(plain)["model.layers.0.ffn.router.bias_E"],
        weights(treated)["model.layers.0.ffn.router.bias_E"],
    )


def test_it_averts_the_failure_of_a_bias_that_is_also_trained(tiny):
    plain, treated = runs(tiny, "router_freeze", *FAILING)
    assert record(plain)["outcome"] == "collapsed"
    assert record(treated)["outcome"] == "clean"
    means = figure(treated, "moe/layer_0/bias_mean")
    assert len({means[step] for step in range(START, 23)}) == 1
