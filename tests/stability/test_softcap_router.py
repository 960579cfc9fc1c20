import pytest
import torch
from transformers import LagunaConfig
from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

from src.common.errors import InputError
from src.config.compose import compose
from src.stability import RunFacts, SoftCapRouterConfig
from tests.builders import DIMS, gqa_config, moe_config, router_config, transformer
from tests.runs import record
from tests.stability.harnessed import figure, first_difference, runs
from tests.stability.test_router_eps import FAILING
from tests.training.harness import Harness, Poison

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)


def router(**changes):
    made = moe_config(router=router_config(**changes)).build(DIMS).router
    torch.nn.init.normal_(made.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    return made


def test_the_cap_is_that_of_lagunas_router():
    config = LagunaConfig(
        hidden_size=DIMS.hidden_dim,
        num_experts=5,
        num_experts_per_tok=2,
        moe_router_logit_softcapping=2.0,
    )
    theirs, ours = LagunaTopKRouter(config), router(softcap=2.0, norm_eps=0.0)
    x_SD = torch.randn(9, DIMS.hidden_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        ours.bias_E.copy_(torch.tensor([0.2, -0.1, 0.0, 0.3, -0.4]))
        theirs.e_score_correction_bias.copy_(ours.bias_E)
    _, weights, picked = theirs(x_SD)
    found, found_picked = ours(x_SD)
    assert torch.equal(found_picked, picked)
    torch.testing.assert_close(found, weights, rtol=1e-6, atol=1e-7)
    assert (found - router(norm_eps=0.0)(x_SD)[0]).abs().max() > 1e-2


def test_the_cap_is_on_what_enters_the_sigmoid():
    x_SD = torch.randn(9, DIMS.hidden_dim, generator=torch.Generator().manual_seed(1))
    for use in ("select", "add", "multiply"):
        ours = router(bias_use=use, softcap=2.0)
        ours.bias_E.copy_(torch.tensor([-90.0, 1.0, 2.0, -3.0, -200.0]))
        logits = x_SD @ ours.weight.T
        moved = {"select": logits, "add": logits + ours.bias_E, "multiply": logits * ours.bias_E}
        scores = (2.0 * torch.tanh(moved[use] / 2.0)).sigmoid()
        preference = scores + ours.bias_E if use == "select" else scores
        picked = scores.gather(-1, preference.topk(2).indices)
        weights, _ = ours(x_SD)
        torch.testing.assert_close(weights, picked / picked.sum(-1, keepdim=True))


def test_scores_that_would_underflow_stay_above_0():
    x_SD = torch.ones(3, DIMS.hidden_dim)
    for softcap, is_finite in ((None, False), (30.0, True)):
        made = router(bias_use="add", norm_eps=0.0, softcap=softcap)
        made.bias_E.fill_(-400.0)
        weights, _ = made(x_SD)
        assert bool(weights.isfinite().all()) == is_finite


def test_it_averts_the_failure_of_a_bias_that_drifts(tiny):
    plain, treated = runs(tiny, "softcap_router", *FAILING)
    assert record(plain)["guard"]["first_nonfinite_step"] is not None
    assert record(treated)["guard"]["first_nonfinite_step"] is None
    assert first_difference(plain, treated) == 1
    peak, cut = (figure(treated, f"stability/softcap_router_{name}") for name in ("peak", "cut"))
    assert peak[22] > 88.7
    assert peak[22] - cut[22] == pytest.approx(30.0, rel=1e-3)


def test_without_it_nothing_is_there():
    assert router().softcap is None
    assert "softcap" not in compose("train", []).plain()["ffn"]["router"]
    with_it = compose("train", ["stability=softcap_router"])
    assert with_it.plain()["ffn"]["router"]["softcap"] == 30.0


def test_a_step_with_nan_leaves_no_trace_in_the_next():
    (stats,) = SoftCapRouterConfig(cap=0.5).callbacks(FACTS)
    ffn = moe_config(router=router_config(softcap=0.5))
    model = transformer(attention=gqa_config(), ffn=ffn, max_seq_len=8)
    poison = Poison({2}, what="loss", at="layers.0.ffn_norm.weight")
    run = Harness(callbacks=[stats, poison], model=model).fit()
    peaks = [run.recorder.lines[n]["stability/softcap_router_peak"] for n in range(1, 7)]
    # The guard puts the buffers back to what they were before the step that it skips.
    assert [peak > 0 for peak in peaks] == [True, False, True, True, True, True]
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_it_needs_a_router_and_a_cap_below_the_underflow():
    with pytest.raises(InputError, match=r"needs ffn.router.softcap, which ffn=mlp lacks"):
        compose("train", ["ffn=mlp", "stability=softcap_router"])
    with pytest.raises(InputError, match=r"ffn.router.softcap=90.0: must be above 0 and below"):
        compose("train", ["stability=softcap_router", "stability.softcap_router.cap=90.0"])
