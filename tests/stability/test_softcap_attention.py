"""tests/model checks decoding, causality and sizes with a soft-cap."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from src.common.errors import InputError
from src.config.compose import compose
from src.model.attention.capped import capped_attention, causal_mask
from src.model.bounds import SoftCap
from src.stability import RunFacts, SoftCapAttentionConfig
from tests.builders import gqa_config, mlha_config, tokens, transformer
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)
EXTERNAL = "model=external", "model.target=src.examples.mlp:build"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Sums of another order in float32."""


def heads(time: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of 4 heads, keys and values of 2, with scores far beyond a cap of 2."""
    draw = torch.Generator().manual_seed(0)
    return tuple(4 * torch.randn(2, num, time, 6, generator=draw) for num in (4, 2, 2))


def test_the_cap_is_that_of_gemma_2():
    query, key, value = heads()
    seen = causal_mask(9, device=query.device)
    later = torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups, module.training, module.head_dim = 2, False, 6
    theirs, _ = eager_attention_forward(module, query, key, value, later, softcap=2.0)
    ours = capped_attention(query, key, value, softcap=SoftCap(2.0), mask=seen)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), **CLOSE)
    uncapped = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (ours - uncapped).abs().max() > 0.1
    # Far above all scores, which reach 100, the cap only rounds them: by 1e-7 of their size.
    wide = capped_attention(query, key, value, softcap=SoftCap(1e6), mask=seen)
    torch.testing.assert_close(wide, uncapped, rtol=1e-4, atol=1e-4)


def test_under_autocast_scores_are_float32_and_the_result_is_bfloat16():
    query, key, value = (x.bfloat16() for x in heads())
    seen, cap = causal_mask(9, device=query.device), SoftCap(2.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = capped_attention(query, key, value, softcap=cap, mask=seen)
    assert half.dtype == torch.bfloat16
    scores = query.float() @ key.float().repeat_interleave(2, dim=1).transpose(2, 3) / 6**0.5
    # In bfloat16 a score of 100 would be off by up to 0.25.
    largest = scores.masked_fill(~seen, 0.0).abs().max()
    torch.testing.assert_close(cap.stats()["peak"], largest, rtol=1e-6, atol=0)
    assert largest != largest.bfloat16()
    whole = capped_attention(
        query.float(), key.float(), value.float(), softcap=SoftCap(2.0), mask=seen
    )
    # Probabilities and the result are rounded to bfloat16.
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=4e-2)


def test_the_statistics_are_of_scores_that_are_seen_in_training():
    cap = SoftCap(2.0)
    scores, seen = torch.tensor([[3.0, -50.0], [-1.0, 2.0]]), causal_mask(2, device="cpu")
    assert torch.equal(cap.eval()(scores, seen), 2.0 * torch.tanh(scores / 2.0))
    assert cap.stats()["peak"] == 0
    cap.train()(scores, seen)
    cap(0.1 * scores, seen)
    assert cap.stats()["peak"] == 3.0
    assert cap.stats()["cut"] == pytest.approx(3.0 - 2.0 * torch.tanh(torch.tensor(1.5)).item())
    cap.reset_stats()
    assert cap.stats()["cut"] == 0


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_it_acts_from_the_first_step_and_says_how_much_it_cut(attention, tiny):
    typed = (f"attention={attention}", "stability.softcap_attention.cap=0.001")
    plain, treated = runs(tiny, "softcap_attention", *typed)
    assert first_difference(plain, treated) == 1
    peak, cut = (figure(treated, f"stability/softcap_attention_{n}") for n in ("peak", "cut"))
    assert all(0 < cut[step] < peak[step] for step in peak)
    assert peak[22] - cut[22] == pytest.approx(0.001, rel=1e-3)
    assert figure(plain, "stability/softcap_attention_peak") == {}


@pytest.mark.parametrize("config", [gqa_config(), mlha_config()])
def test_without_it_a_model_has_no_cap_and_a_configuration_no_field(config):
    assert transformer(attention=config).blocks()[0].attention.softcap is None
    assert "softcap" not in compose("train", []).plain()["attention"]
    with_it = compose("train", ["stability=softcap_attention"])
    assert with_it.plain()["attention"]["softcap"] == 50.0
    assert compose("train", ["attention.softcap=null"]).config_hash(corpus="x") == (
        compose("train", []).config_hash(corpus="x")
    )


def test_its_peak_is_that_of_all_micro_batches_of_a_step():
    (stats,) = SoftCapAttentionConfig(cap=0.1).callbacks(FACTS)
    model, peaks = transformer(attention=gqa_config(softcap=0.1), max_seq_len=8), []

    def keep(module, args, output):
        scores, seen = args
        peaks.append(scores.masked_fill(~seen, 0.0).abs().max().item())

    for block in model.blocks():
        block.attention.softcap.register_forward_hook(keep)
    run = Harness(recipe=recipe_config(accumulate=3), callbacks=[stats], model=model).fit()
    for step in range(1, 7):
        # Of two layers in three micro-batches.
        assert run.recorder.lines[step]["stability/softcap_attention_peak"] == (
            max(peaks[6 * step - 6 : 6 * step])
        )


def test_a_step_with_nan_leaves_no_trace_in_the_next():
    (stats,) = SoftCapAttentionConfig(cap=0.1).callbacks(FACTS)
    model = transformer(attention=gqa_config(softcap=0.1), max_seq_len=8)
    poison = Poison({2}, what="loss", at="layers.0.attention_norm.weight")
    run = Harness(callbacks=[stats, poison], model=model).fit()
    peaks = [run.recorder.lines[n]["stability/softcap_attention_peak"] for n in range(1, 7)]
    # The guard puts the buffers back to what they were before the step that it skips.
    assert [peak > 0 for peak in peaks] == [True, False, True, True, True, True]
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_a_model_without_it_cannot_be_restored_from_one_with_it():
    """Decoding a capped model without its cap would be another model: the configuration says so."""
    with_it = transformer(attention=gqa_config(softcap=0.01)).eval()
    without = transformer(attention=gqa_config()).eval()
    without.load_state_dict(with_it.state_dict())
    assert not torch.allclose(with_it(tokens()), without(tokens()), atol=1e-4)


def test_an_external_model_is_refused():
    with pytest.raises(InputError, match=r"needs attention.softcap, which attention=external"):
        compose("train", [*EXTERNAL, "stability=softcap_attention"])
    with pytest.raises(InputError, match=r"softcap_attention.cap=0.0: must be above 0"):
        compose("train", ["stability=softcap_attention", "stability.softcap_attention.cap=0.0"])
