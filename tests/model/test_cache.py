"""Decoding with a cache gives what the full forward pass gives."""

import pytest
import torch
import torch.nn.functional as F

from src.model.attention import mlha
from src.model.size import measure
from tests.builders import (
    ATTENTION_CASES,
    FFN_CASES,
    VOCAB,
    mlha_config,
    model_config,
    tokens,
    transformer,
)

CELLS = [
    *[pytest.param(a, FFN_CASES["mlp"], id=name) for name, a in ATTENTION_CASES.items()],
    pytest.param(mlha_config(rope_dim=10), FFN_CASES["mlp"], id="mlha-all-rotated"),
    pytest.param(mlha_config(num_rope_keys=4), FFN_CASES["mlp"], id="mlha-a-rope-key-a-head"),
    pytest.param(ATTENTION_CASES["mlha"], FFN_CASES["moe"], id="mlha+moe"),
]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Products of other shapes, and of other order when absorbed: rounding of float32."""


def decoded(model, ids, *, chunks, num_padding=None, num_slots=None):
    """Logits at every position, by `extend` in pieces of these lengths."""
    padding = [0] * len(ids) if num_padding is None else num_padding
    cache = model.new_cache(num_padding=padding, num_slots=num_slots or ids.shape[1])
    return torch.cat([model.extend(part, cache) for part in ids.split(chunks, dim=1)], dim=1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1]], ids=str)
def test_every_position_has_the_logits_of_the_full_pass(attention, ffn, chunks):
    model = transformer(attention=attention, ffn=ffn).eval()
    ids = tokens(batch=3, time=12)
    torch.testing.assert_close(decoded(model, ids, chunks=chunks), model(ids), **CLOSE)


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_rows_of_unequal_length_are_as_each_by_itself(attention, ffn):
    model = transformer(attention=attention, ffn=ffn).eval()
    rows = [tokens(batch=1, time=time, seed=time)[0] for time in (9, 4, 1)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0), value=7) for row in rows])
    more = tokens(batch=3, time=5, seed=2)
    cache = model.new_cache(num_padding=[0, 5, 8], num_slots=14)
    found = [model.extend(ids, cache)]
    found += [model.extend(more[:, place : place + 1], cache) for place in range(5)]
    logits = torch.cat(found, dim=1)
    assert logits.isfinite().all()
    for place, row in enumerate(rows):
        alone = model(torch.cat([row, more[place]])[None])[0]
        torch.testing.assert_close(logits[place, 9 - len(row) :], alone, **CLOSE)


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_the_cache_takes_the_bytes_a_token_that_describe_states(attention, ffn):
    model = transformer(attention=attention, ffn=ffn, max_seq_len=32)
    size = measure(model=model_config(), attention=attention, ffn=ffn, vocab_size=VOCAB, seq_len=16)
    cache = model.new_cache(num_padding=[0, 0, 0], num_slots=32)
    assert cache.num_bytes == size.cache_bytes_per_token * 3 * 32
    before = [t.data_ptr() for layer in cache.layers for t in layer.values()]
    model.extend(tokens(batch=3, time=12), cache)
    assert [t.data_ptr() for layer in cache.layers for t in layer.values()] == before


def test_mlha_keeps_the_latent_and_the_rope_key_only():
    model = transformer(attention=mlha_config(kv_latent_dim=8, rope_dim=4))
    cache = model.new_cache(num_padding=[0], num_slots=16)
    assert {name: t.shape[1::2] for name, t in cache.layers[0].items()} == {
        "latents": (1, 8),
        "rope_keys": (1, 4),
    }


@pytest.mark.parametrize(
    ("changes", "absorbed"), [({}, True), ({"latent_norm": True}, True), ({"qk_norm": True}, False)]
)
def test_keys_are_made_for_every_head_only_where_their_norm_needs_them(
    changes, absorbed, monkeypatch
):
    made = []
    original = mlha.MultiHeadLatentAttention._decompress
    monkeypatch.setattr(
        mlha.MultiHeadLatentAttention,
        "_decompress",
        lambda self, *args: made.append(1) or original(self, *args),
    )
    config = mlha_config(**changes)
    model = transformer(attention=config).eval()
    decoded(model, tokens(batch=1), chunks=[6, 6])
    assert (not made) == absorbed
    size = measure(
        model=model_config(), attention=config, ffn=FFN_CASES["mlp"], vocab_size=VOCAB, seq_len=16
    )
    assert ("un-absorbed: qk_norm" in size.decoding) == (not absorbed)


def test_what_does_not_fit_is_refused():
    model = transformer(max_seq_len=16)
    with pytest.raises(ValueError, match="17 tokens exceeds the context of 16"):
        model.new_cache(num_padding=[0, 3], num_slots=17)
    # Padding takes slots, not context.
    cache = model.new_cache(num_padding=[1, 3], num_slots=17)
    model.extend(tokens(batch=2, time=16), cache)
    with pytest.raises(ValueError, match="18 tokens exceed the cache's 17"):
        model.extend(tokens(batch=2, time=2), cache)
    assert cache.length == 16
