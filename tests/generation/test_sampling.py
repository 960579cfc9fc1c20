"""How a token is drawn, against the library that everybody trusts."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from src.generation.sampling import Sampling

LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3
TEXT = [3, 5, 5, 8]


def sampling(**changes) -> Sampling:
    values = {"temperature": 1.0, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    return Sampling(**(values | changes))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("top_k", [1, 2, 7, 40, 100])
def test_top_k_keeps_what_transformers_keeps(top_k):
    expected = TopKLogitsWarper(top_k)(None, LOGITS[None])[0].softmax(dim=-1)
    torch.testing.assert_close(sampling(top_k=top_k).probabilities(LOGITS), expected)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p):
    expected = TopPLogitsWarper(top_p)(None, LOGITS[None])[0].softmax(dim=-1)
    found = sampling(top_p=top_p).probabilities(LOGITS)
    assert (found > 0).sum() == (expected > 0).sum() > 0
    torch.testing.assert_close(found, expected)


def test_top_p_counts_what_top_k_has_left():
    narrowed = TopKLogitsWarper(5)(None, LOGITS[None])
    expected = TopPLogitsWarper(0.8)(None, narrowed)[0].softmax(dim=-1)
    found = sampling(top_k=5, top_p=0.8).probabilities(LOGITS)
    torch.testing.assert_close(found, expected)


def test_tokens_of_the_text_are_penalised_once_each():
    ids = torch.tensor([TEXT])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, LOGITS[None].clone())[0]
    best = int(expected.argmax())
    found = sampling(temperature=0.0, repetition_penalty=1.5).pick(LOGITS, TEXT, generator())
    assert found == best
    # A penalty that changes the choice, so that the test can fail.
    winner = int(LOGITS.argmax())
    assert sampling(temperature=0.0).pick(LOGITS, [winner], generator()) == winner
    strong = sampling(temperature=0.0, repetition_penalty=100.0)
    assert strong.pick(LOGITS, [winner], generator()) == int(LOGITS.topk(2).indices[1])


def test_temperature_0_is_the_likeliest_token_and_draws_nothing():
    draws = generator()
    before = draws.get_state()
    assert sampling(temperature=0.0).pick(LOGITS, TEXT, draws) == int(LOGITS.argmax())
    assert torch.equal(draws.get_state(), before)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    draws, chosen = generator(), sampling(temperature=2.0, top_k=4)
    counts = torch.zeros(40)
    for _ in range(4000):
        counts[chosen.pick(LOGITS, TEXT, draws)] += 1
    expected = TopKLogitsWarper(4)(None, LOGITS[None] / 2)[0].softmax(dim=-1)
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.032)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
    ],
)
def test_what_is_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampling(**changes)
