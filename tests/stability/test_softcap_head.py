import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from src.common.errors import InputError
from src.config.compose import compose
from src.model import size
from src.stability import RunFacts, SoftCapHeadConfig
from src.training import loss
from tests.builders import gqa_config, model_config, moe_config, tokens, transformer
from tests.model.test_cache import CLOSE, decoded
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)


def capped(cap: float | None = 0.5, **changes):
    return transformer(model=model_config(head_softcap=cap), attention=gqa_config(), **changes)


def test_the_cap_is_that_of_gemma_2():
    config = Gemma2Config(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        final_logit_softcapping=None,
        pad_token_id=None,
    )
    theirs = Gemma2ForCausalLM(config).eval()
    theirs.lm_head.weight.data.mul_(20)
    with torch.no_grad():
        before = theirs(tokens()).logits
        theirs.config.final_logit_softcapping = 0.5
        after = theirs(tokens()).logits
    assert before.abs().max() > 1
    torch.testing.assert_close(capped().eval().softcap(before), after, rtol=1e-6, atol=1e-7)


def test_every_logit_is_bound_in_training_and_decoding():
    model, ids = capped().eval(), tokens()
    with torch.no_grad():
        uncapped = capped(None).eval()(ids)
        logits = model(ids)
        torch.testing.assert_close(logits, 0.5 * torch.tanh(uncapped / 0.5))
        torch.testing.assert_close(decoded(model, ids, chunks=[5, 1, 6]), logits, **CLOSE)
    assert (uncapped - logits).abs().max() > 0.1


def test_a_large_vocabulary_is_capped_too(monkeypatch):
    """The loss in chunks computes logits from the head's weight: it would leave out the cap."""
    monkeypatch.setattr(loss, "CHUNKED_VOCAB", 8)
    ids, targets = tokens(batch=6), tokens(batch=6, seed=2)
    assert loss.uses_chunks(capped().head.weight, num_tokens=ids.numel())
    found = loss.losses(capped(), ids, targets, z_loss_weight=0.0)["loss"]
    expected = loss.cross_entropy(capped()(ids), targets).mean()
    torch.testing.assert_close(found, expected)
    other = loss.losses(capped(None), ids, targets, z_loss_weight=0.0)["loss"]
    assert abs(other - found) > 1e-4


def test_it_acts_from_the_first_step_and_says_how_much_it_cut(tiny):
    plain, treated = runs(tiny, "softcap_head", "stability.softcap_head.cap=0.1")
    assert first_difference(plain, treated) == 1
    peak, cut = (figure(treated, f"stability/softcap_head_{name}") for name in ("peak", "cut"))
    assert all(0 < cut[step] < peak[step] for step in peak)
    assert peak[22] - cut[22] == pytest.approx(0.1, rel=0.05)


def test_without_it_nothing_is_there():
    assert capped(None).softcap is None
    plain = compose("train", []).plain()
    assert "head_softcap" not in plain["model"]
    with_it = compose("train", ["stability=softcap_head"])
    assert with_it.plain()["model"]["head_softcap"] == 30.0
    sizes = {"attention": gqa_config(), "ffn": moe_config(), "vocab_size": 29, "seq_len": 16}
    assert size.measure(model=model_config(head_softcap=1.0), **sizes) == (
        size.measure(model=model_config(), **sizes)
    )


def test_a_step_with_nan_leaves_no_trace_in_the_next():
    (stats,) = SoftCapHeadConfig(cap=0.5).callbacks(FACTS)
    run = Harness(callbacks=[stats, Poison({2}, what="loss")], model=capped(max_seq_len=8)).fit()
    peaks = [run.recorder.lines[n]["stability/softcap_head_peak"] for n in range(1, 7)]
    # The guard puts the buffers back to what they were before the step that it skips.
    assert [peak > 0 for peak in peaks] == [True, False, True, True, True, True]
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_an_external_model_and_an_impossible_cap_are_refused():
    external = ["model=external", "model.target=src.examples.mlp:build"]
    with pytest.raises(InputError, match=r"stability=softcap_head: needs model.head_softcap"):
        compose("train", [*external, "stability=softcap_head"])
    with pytest.raises(InputError, match=r"stability.softcap_head.cap=-1.0: must be above 0"):
        compose("train", ["stability=softcap_head", "stability.softcap_head.cap=-1.0"])
