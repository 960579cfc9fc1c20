"""What holds for every attention and every feed-forward option."""

import pytest
import torch
import torch.nn.functional as F

from src.model.attention import ATTENTIONS
from src.model.ffn import FEED_FORWARDS
from src.model.size import measure
from tests.builders import (
    ATTENTION_CASES,
    FFN_CASES,
    VOCAB,
    gqa_config,
    mlha_config,
    model_config,
    tokens,
    transformer,
)

CELLS = [
    *[
        pytest.param(attention, FFN_CASES["mlp"], id=name)
        for name, attention in ATTENTION_CASES.items()
    ],
    *[pytest.param(ATTENTION_CASES["mlha"], ffn, id=name) for name, ffn in FFN_CASES.items()],
    pytest.param(ATTENTION_CASES["gqa"], FFN_CASES["moe"], id="gqa+moe"),
]


def test_every_registered_option_has_a_case_here():
    assert {type(c) for c in ATTENTION_CASES.values()} == set(ATTENTIONS.values())
    assert {type(c) for c in FFN_CASES.values()} == set(FEED_FORWARDS.values())


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_logits_have_a_row_for_each_token_and_every_parameter_gets_a_gradient(attention, ffn):
    model = transformer(attention=attention, ffn=ffn)
    ids = tokens()
    logits = model(ids)
    assert logits.shape == (*ids.shape, VOCAB)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    sum(model.extra_losses().values(), loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_a_batch_of_two_equals_two_singles(attention, ffn):
    model = transformer(attention=attention, ffn=ffn).eval()
    ids = tokens(batch=2)
    both = model(ids)
    singles = torch.cat([model(ids[:1]), model(ids[1:])])
    # Products of other shapes may sum in another order: some rounding steps of float32.
    torch.testing.assert_close(both, singles, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_a_later_token_never_changes_an_earlier_output(attention, ffn):
    model = transformer(attention=attention, ffn=ffn).eval()
    ids = tokens(batch=1)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % VOCAB
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], rtol=1e-3)


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_position_matters(attention, ffn):
    model = transformer(attention=attention, ffn=ffn).eval()
    ids = torch.tensor([[3, 5, 5, 8, 2]])
    swapped = torch.tensor([[5, 3, 5, 8, 2]])
    # Without positions the last query would see the same set of keys.
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_the_declared_parameter_count_equals_the_built_one(attention, ffn):
    size = measure(model=model_config(), attention=attention, ffn=ffn, vocab_size=VOCAB, seq_len=16)
    built = transformer(attention=attention, ffn=ffn)
    assert size.params_total == built.num_params() == sum(size.params_by_part.values())
    assert size.params_active == built.num_active_params()


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_state_survives_save_and_load(attention, ffn, tmp_path):
    model = transformer(attention=attention, ffn=ffn)
    torch.save(model.state_dict(), tmp_path / "weights")
    other = transformer(attention=attention, ffn=ffn, seed=5)
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert torch.equal(model.eval()(tokens()), other.eval()(tokens()))


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens exceeds the context of 16"):
        transformer(max_seq_len=16)(tokens(time=17))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gqa_config(rope_dim=5), "rope_dim=5: must be positive and even"),
        (gqa_config(rope_dim=12), "rope_dim=12: must be at most head_dim=10"),
        (gqa_config(num_kv_heads=3), "num_kv_heads=3: must divide model.num_heads=4"),
        (mlha_config(rope_dim=3), "rope_dim=3"),
        (mlha_config(num_rope_keys=3), "num_rope_keys=3"),
        (mlha_config(kv_latent_dim=0), "kv_latent_dim=0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        transformer(attention=config)


def test_weights_of_one_name_and_shape_are_equal_in_all_compositions():
    one = dict(transformer(attention=ATTENTION_CASES["mlha"]).named_parameters())
    two = dict(transformer(attention=ATTENTION_CASES["gqa"]).named_parameters())
    shared = [name for name in one if name in two and one[name].shape == two[name].shape]
    assert "layers.1.ffn.experts.down_proj" in shared
    assert all(torch.equal(one[name], two[name]) for name in shared)
    other_seed = dict(transformer(seed=1).named_parameters())
    assert not torch.equal(one["embedding.weight"], other_seed["embedding.weight"])


def test_initialisation_has_the_declared_spreads():
    config = model_config(
        hidden_dim=240,
        num_layers=2,
        residual_init="depth_scaled",
        init_std=0.1,
        router_init_std=0.5,
    )
    weights = dict(transformer(model=config).named_parameters())
    expected = {
        "embedding.weight": 0.1,
        "layers.0.attention.q_down.weight": 0.1,
        "layers.0.attention.o_proj.weight": 0.1 / 2,
        "layers.1.ffn.experts.down_proj": 0.1 / 2,
        "layers.1.ffn.shared.down_proj.weight": 0.1 / 2,
        "layers.1.ffn.experts.up_proj": 0.1,
        "layers.1.ffn.router.weight": 0.5,
    }
    for name, std in expected.items():
        # The smallest has 1200 entries: three standard errors are 6 %.
        assert weights[name].std().item() == pytest.approx(std, rel=0.06), name
    assert torch.equal(weights["final_norm.weight"], torch.ones(240))


def test_untied_embeddings_have_a_head_of_their_own():
    tied, untied = transformer(), transformer(model=model_config(tie_embeddings=False))
    assert untied.num_params() - tied.num_params() == VOCAB * 24
