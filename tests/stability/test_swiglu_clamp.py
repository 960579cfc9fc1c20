"""tests/model checks decoding, causality and sizes with a clamp."""

import pytest
import torch
from transformers import DeepseekV4Config, GptOssConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from src.common.errors import InputError
from src.config.compose import compose
from src.model.ffn.experts import Experts
from src.model.ffn.mlp import MLP, MLPConfig
from src.model.ffn.swiglu import SwiGLUClamp
from src.stability import RunFacts, SwiGLUClampConfig
from tests.builders import gqa_config, moe_config, transformer
from tests.runs import assert_same_tree, weights
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Sums of another order in float32."""


def large(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_dense_layer_is_that_of_deepseek_v4():
    config = DeepseekV4Config(hidden_size=6, intermediate_size=10, swiglu_limit=2.0)
    theirs, ours = DeepseekV4MLP(config), MLP(hidden_dim=6, inner_dim=10, limit=2.0)
    for name in ("gate_proj", "up_proj", "down_proj"):
        width = getattr(theirs, name).weight
        getattr(theirs, name).weight.data = getattr(ours, name).weight.data = large(*width.shape)
    x = large(2, 5, 6, seed=1)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    plain = MLP(hidden_dim=6, inner_dim=10)
    plain.load_state_dict(ours.state_dict())
    assert (plain(x) - ours(x)).abs().max() > 1


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_experts_are_those_of_deepseek_v4(dispatch):
    config = DeepseekV4Config(
        hidden_size=8, moe_intermediate_size=16, n_routed_experts=3, swiglu_limit=2.0
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV4Experts(config)
    ours = Experts(num_experts=3, hidden_dim=8, inner_dim=16, dispatch=dispatch, limit=2.0)
    for seed, weight in enumerate((ours.gate_proj, ours.up_proj, ours.down_proj)):
        weight.data = large(*weight.shape, seed=seed)
    theirs.gate_up_proj.data = torch.cat((ours.gate_proj.data, ours.up_proj.data), dim=1)
    theirs.down_proj.data = ours.down_proj.data
    x_SD, weights_SK = large(7, 8, seed=5), torch.rand(7, 2)
    picked_SK = torch.rand(7, 3).topk(2).indices
    theirs_SD = theirs(x_SD, picked_SK, weights_SK)
    torch.testing.assert_close(ours(x_SD, weights_SK, picked_SK), theirs_SD, rtol=1e-4, atol=1e-3)
    # A single token in decoding takes a path of its own.
    with torch.no_grad():
        one = ours(x_SD[:1], weights_SK[:1], picked_SK[:1])
    torch.testing.assert_close(one, theirs_SD[:1], rtol=1e-4, atol=1e-3)


def test_the_bounds_are_those_of_gpt_oss():
    """Its function within the bounds differs, so only the bounds are compared."""
    gate, up = large(50, seed=1), large(50, seed=2)
    theirs = GptOssExperts(
        GptOssConfig(hidden_size=4, intermediate_size=50, num_local_experts=1, swiglu_limit=2.0)
    )
    both = torch.stack((gate, up), dim=-1).flatten()
    bound_gate, bound_up = SwiGLUClamp(2.0)(gate, up)
    again = torch.stack((bound_gate, bound_up), dim=-1).flatten()
    torch.testing.assert_close(theirs._apply_gate(both), theirs._apply_gate(again))
    assert bound_gate.min() == gate.min() < -2 and bound_up.min() == -2
    assert bound_gate.max() == bound_up.max() == 2


@pytest.mark.parametrize("ffn", ["mlp", "moe"])
def test_it_acts_from_the_first_step_and_says_how_often(ffn, tiny):
    plain, treated = runs(tiny, "swiglu_clamp", f"ffn={ffn}", "stability.swiglu_clamp.limit=0.01")
    assert first_difference(plain, treated) == 1
    fracs = figure(treated, "stability/swiglu_clamp_frac")
    assert len(fracs) == 22
    assert all(0 < frac < 1 for frac in fracs.values())


def test_a_bound_that_never_binds_is_the_baseline_bit_by_bit(tiny):
    plain, treated = runs(tiny, "swiglu_clamp", "stability.swiglu_clamp.limit=1e6")
    assert first_difference(plain, treated) is None
    assert_same_tree(weights(plain), weights(treated))
    assert set(figure(treated, "stability/swiglu_clamp_frac").values()) == {0.0}
    assert figure(plain, "stability/swiglu_clamp_frac") == {}


def test_without_it_nothing_is_there():
    block = transformer(ffn=moe_config()).blocks()[0].ffn
    assert block.experts.clamp is None and block.shared.clamp is None
    assert "swiglu_limit" not in compose("train", []).plain()["ffn"]
    with_it = compose("train", ["stability=swiglu_clamp"])
    assert with_it.plain()["ffn"]["swiglu_limit"] == 10.0
    bound = transformer(ffn=moe_config(swiglu_limit=1.0)).blocks()[0].ffn
    assert (bound.experts.clamp.limit, bound.shared.clamp.limit) == (1.0, 1.0)


def fitted(*others, model=None, **changes):
    (stats,) = SwiGLUClampConfig(limit=0.1).callbacks(FACTS)
    ffn = MLPConfig(inner_dim=32, swiglu_limit=0.1)
    model = model or transformer(attention=gqa_config(), ffn=ffn, max_seq_len=8)
    return Harness(recipe=recipe_config(**changes), callbacks=[stats, *others], model=model).fit()


def test_its_share_is_that_of_all_micro_batches_of_a_step():
    ffn = MLPConfig(inner_dim=32, swiglu_limit=0.1)
    model, shares = transformer(attention=gqa_config(), ffn=ffn, max_seq_len=8), ([], [])
    for block, seen in zip(model.blocks(), shares, strict=True):

        def keep(module, args, output, seen=seen):
            gate, up = args
            seen.append(torch.cat((gate > 0.1, up.abs() > 0.1)).float().mean().item())

        block.ffn.clamp.register_forward_hook(keep)
    lines = fitted(model=model, accumulate=3).recorder.lines
    for step in range(1, 7):
        of_step = [sum(seen[3 * step - 3 : 3 * step]) / 3 for seen in shares]
        found = lines[step]["stability/swiglu_clamp_frac"]
        assert found == pytest.approx(max(of_step), rel=1e-5)


def test_a_step_with_nan_leaves_no_trace():
    assert SwiGLUClamp(1.0)(torch.tensor([float("nan")]), torch.ones(1))[0].isnan().all()
    run = fitted(Poison({2}, what="loss", at="layers.0.ffn_norm.weight"))
    fracs = [run.recorder.lines[n]["stability/swiglu_clamp_frac"] for n in range(1, 7)]
    assert all(0 <= frac < 1 for frac in fracs)
    assert run.recorder.lines[2]["guard/skipped"] == 1
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_an_external_model_is_refused():
    external = ["model=external", "model.target=src.examples.mlp:build"]
    with pytest.raises(InputError, match=r"needs ffn.swiglu_limit, which ffn=external lacks"):
        compose("train", [*external, "stability=swiglu_clamp"])
