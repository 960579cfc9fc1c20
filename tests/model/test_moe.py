import pytest
import torch
from torch import nn

from src.model.ffn.experts import Experts
from src.model.ffn.mlp import MLP
from tests.builders import DIMS, moe_config, router_config


def build(**changes):
    torch.manual_seed(0)
    moe = moe_config(**changes).build(DIMS)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe


def x(tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens // 2, DIMS.hidden_dim, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner"), [(10, 17), (8, 6), (7, 8)])
def test_sizes_that_fill_no_whole_16_bytes_work_too(hidden, inner, dtype):
    draw = torch.Generator().manual_seed(0)
    x_SD = torch.randn(30, hidden, generator=draw)
    weights_SK = torch.rand(30, 2, generator=draw)
    picked_SK = torch.rand(30, 6, generator=draw).topk(2).indices
    outputs = []
    for dispatch in ("loop", "grouped"):
        sizes = {"num_experts": 6, "hidden_dim": hidden, "inner_dim": inner}
        experts = Experts(**sizes, dispatch=dispatch)
        for index, parameter in enumerate(experts.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs.append(experts(x_SD, weights_SK, picked_SK))
    # bfloat16 has eight bits; each path rounds in its own order.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("picked", ["spread", "three experts without tokens"])
def test_both_dispatch_paths_agree_in_outputs_and_gradients(picked):
    draw = torch.Generator().manual_seed(0)
    x_SD = torch.randn(30, 8, generator=draw)
    weights_SK = torch.rand(30, 2, generator=draw)
    picked_SK = torch.rand(30, 6, generator=draw).topk(2).indices
    if picked != "spread":
        picked_SK = torch.tensor([[1, 4]]).expand(30, 2).clone()
        picked_SK[::3] = torch.tensor([4, 2])
    results = []
    for dispatch in ("loop", "grouped"):
        experts = Experts(num_experts=6, hidden_dim=8, inner_dim=12, dispatch=dispatch)
        for index, parameter in enumerate(experts.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
        inputs = x_SD.clone().requires_grad_(), weights_SK.clone().requires_grad_()
        y_SD = experts(*inputs, picked_SK)
        (y_SD * torch.arange(8.0)).sum().backward()
        grads = [tensor.grad for tensor in (*inputs, *experts.parameters())]
        results.append([y_SD, *grads])
    for loop, grouped in zip(*results, strict=True):
        # 1e-5 of the largest value: the sums run in another order.
        torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5 * loop.abs().max().item())
    unused = [e for e in range(6) if e not in picked_SK]
    assert all(results[1][3][e].abs().sum() == 0 for e in unused)


def test_one_expert_is_the_mlp():
    moe = build(num_routed=1, top_k=1, num_shared=0)
    mlp = MLP(hidden_dim=DIMS.hidden_dim, inner_dim=16)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(mlp, name).weight.copy_(getattr(moe.experts, name)[0])
    torch.testing.assert_close(moe(x()), mlp(x()), rtol=1e-5, atol=1e-6)


def test_weights_sum_to_one_and_the_bias_picks_without_weighing():
    moe = build()
    router, x_SD = moe.router, x().flatten(0, 1)
    weights, _ = router(x_SD)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    with torch.no_grad():
        router.bias_E[3] = 10.0
    weights, picked = router(x_SD)
    assert (picked == 3).any(dim=-1).all()
    scores = (x_SD @ router.weight.T).sigmoid().gather(-1, picked)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_the_router_is_float32_under_autocast_unless_told_otherwise():
    exact = build().router
    x_SD = x().flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = exact(x_SD)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, exact(x_SD)[0])
    rough = build(router=router_config(dtype="autocast")).router
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(rough(x_SD)[0].float(), inside)


def test_the_sign_update_moves_by_the_rate_towards_the_mean_load_and_is_centred():
    router = build(router=router_config(bias_rate=0.5)).router
    router.counts_E.copy_(torch.tensor([10, 0, 6, 6, 8]))  # mean 6
    router.finish_step(applied=True)
    raw = 0.5 * torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0])
    torch.testing.assert_close(router.bias_E, raw - raw.mean())
    assert router.counts_E.sum() == 0
    assert router.router_stats() == {}  # no forward pass yet


def test_the_published_update_lowers_the_mean_bias_whatever_the_routing():
    published = router_config(
        bias_rule="proportional", bias_target="one_over_experts", bias_rate=0.1, bias_center=False
    )
    router = moe_config(num_routed=7, router=published).build(DIMS).router
    router.counts_E.copy_(torch.tensor([50, 0, 0, 0, 3, 7, 40]))
    router.finish_step(applied=True)
    # rate * (top_k - 1) / E, from the wrong target: loads average 2/7, never 1/7.
    assert router.bias_E.mean().item() == pytest.approx(-0.1 / 7, rel=1e-5)


@pytest.mark.parametrize("balance", ["bias", "aux", "none"])
def test_only_balance_bias_moves_the_bias(balance):
    moe = build(router=router_config(balance=balance))
    moe(x())
    moe.router.finish_step(applied=True)
    assert (moe.router.bias_E.abs().sum() > 0) == (balance == "bias")
    assert (moe.extra_losses() != {}) == (balance == "aux")


def test_a_skipped_step_and_evaluation_leave_the_bias_bitwise():
    moe = build()
    moe(x())
    moe.router.finish_step(applied=True)
    before = moe.router.bias_E.clone()
    moe(x())
    moe.router.finish_step(applied=False)
    moe.eval()(x())
    assert moe.router.counts_E.sum() == 0
    assert torch.equal(moe.router.bias_E, before)


def test_counts_add_up_over_micro_batches():
    moe = build()
    moe(x())
    moe.router.finish_batch()
    moe(x())
    assert moe.router.counts_E.sum() == 2 * 40 * 2


def test_updates_on_every_batch_where_the_config_says_so():
    moe = build(router=router_config(update_on="batch"))
    moe(x())
    moe.router.finish_batch()
    assert moe.router.counts_E.sum() == 0
    assert moe.router.bias_E.abs().sum() > 0


def test_a_trainable_bias_is_a_parameter_and_the_default_is_none():
    assert "bias_E" not in dict(build().router.named_parameters())
    assert "bias_E" in build().router.state_dict()
    trained = build(router=router_config(bias_trainable=True, bias_use="add")).router
    weights, _ = trained(x().flatten(0, 1))
    weights[:, 0].sum().backward()
    assert trained.bias_E.grad is not None


@pytest.mark.parametrize("use", ["add", "multiply"])
def test_a_bias_on_the_logits_underflows_to_zero_over_zero(use):
    config = router_config(bias_use=use, norm_eps=0.0, bias_trainable=False)
    router = build(router=config).router
    with torch.no_grad():
        router.bias_E.fill_(-200.0)
        router.weight.copy_(router.weight.abs())
    weights, _ = router(torch.ones(4, DIMS.hidden_dim))
    assert weights.isnan().all()
    stats = router.router_stats()
    assert stats["topk_sum_min"] == 0.0
    assert stats["picked_logit_min"] < -88.73
    mended = build(router=router_config(bias_use=use, norm_eps=1e-9)).router
    with torch.no_grad():
        mended.bias_E.fill_(-200.0)
    assert mended(x().flatten(0, 1))[0].isfinite().all()


def test_the_balance_loss_is_least_for_an_even_load():
    config = router_config(balance="aux", aux_weight=1.0)
    moe = build(router=config, num_routed=4, top_k=1)
    router = moe.router
    scores = torch.eye(4).repeat(3, 1)
    even = router._balance_loss(scores, torch.tensor([3, 3, 3, 3]))
    skewed = router._balance_loss(torch.eye(4)[[0, 0, 0, 1]], torch.tensor([3, 1, 0, 0]))
    assert even.item() == pytest.approx(1.0)
    assert skewed.item() > 2.0


def test_router_stats_are_those_of_the_closed_count():
    moe = build()
    moe(x())
    counts = moe.router.counts_E.clone().float()
    moe.router.finish_step(applied=True)
    stats = moe.router.router_stats()
    assert stats["max_violation"] == pytest.approx(counts.max().item() / counts.mean().item() - 1)
    assert stats["load_max"] == pytest.approx(counts.max().item() / 40)
    assert stats["load_min"] == pytest.approx(counts.min().item() / 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, "top_k=6: must be from 1 to ffn.num_routed=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_shared": -1}, "num_shared=-1"),
        ({"inner_dim": 0}, "inner_dim=0"),
        ({"dispatch": "magic"}, "dispatch=magic: must be one of grouped, loop"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**changes)


@pytest.mark.parametrize(
    "changes", [{"balance": "luck"}, {"norm_eps": -1e-9}, {"bias_rate": float("nan")}]
)
def test_impossible_router_settings_are_refused(changes):
    field, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"router.{field}={value}"):
        router_config(**changes)
