"""Continuing prompts with a cache is what full forward passes would write."""

import pytest
import torch

from src.generation import decode
from src.generation.decode import continue_prompts
from src.generation.sampling import Sampling
from tests.builders import ATTENTION_CASES, FFN_CASES, tokens, transformer

GREEDY = Sampling(temperature=0.0, top_p=None, top_k=None, repetition_penalty=1.0)
DRAWN = Sampling(temperature=1.0, top_p=0.9, top_k=None, repetition_penalty=1.3)

CELLS = [
    *[pytest.param(a, FFN_CASES["mlp"], id=name) for name, a in ATTENTION_CASES.items()],
    pytest.param(ATTENTION_CASES["mlha"], FFN_CASES["moe"], id="mlha+moe"),
]


def prompt(time: int) -> list[int]:
    return tokens(batch=1, time=time, seed=time)[0].tolist()


def continued(model, prompts, *, number, sampling=GREEDY, seed=0, on_token=None):
    return continue_prompts(
        model, prompts, max_new_tokens=number, sampling=sampling, seed=seed, on_token=on_token
    )


@torch.no_grad()
def by_full_passes(model, ids: list[int], *, number: int) -> list[int]:
    """Greedy, and a full context goes on with its later half."""
    window, new = list(ids), []
    for _ in range(number):
        if len(window) > model.max_seq_len:
            window = window[-(model.max_seq_len // 2) :]
        new.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window.append(new[-1])
    return new


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_it_writes_what_full_passes_write_beyond_the_context_too(attention, ffn):
    model = transformer(attention=attention, ffn=ffn, max_seq_len=16).eval()
    prompts = [prompt(9), prompt(1), prompt(16)]
    found = continued(model, prompts, number=40)
    assert found == [by_full_passes(model, ids, number=40) for ids in prompts]


def test_a_text_hangs_on_its_prompt_its_place_and_the_seed_alone():
    model = transformer(max_seq_len=16)
    first, other = prompt(5), prompt(12)
    alone = continued(model, [first], number=30, sampling=DRAWN)
    assert continued(model, [first, other], number=30, sampling=DRAWN)[0] == alone[0]
    assert continued(model, [first], number=30, sampling=DRAWN) == alone
    assert continued(model, [first], number=30, sampling=DRAWN, seed=1) != alone
    twice = continued(model, [first, first], number=30, sampling=DRAWN)
    assert twice[0] != twice[1]


def test_a_prompt_is_read_once_and_every_further_token_by_itself(monkeypatch):
    model = transformer(max_seq_len=64)
    lengths = []
    original = type(model).extend
    monkeypatch.setattr(
        type(model),
        "extend",
        lambda self, ids, cache: lengths.append(ids.shape[1]) or original(self, ids, cache),
    )
    continued(model, [prompt(9), prompt(4)], number=6)
    assert lengths == [9, 1, 1, 1, 1, 1]


def test_tokens_are_told_as_they_are_drawn_and_the_mode_stays():
    model = transformer(max_seq_len=16).train()
    told = []
    found = continued(
        model,
        [prompt(3), prompt(5)],
        number=4,
        on_token=lambda place, token: told.append((place, token)),
    )
    assert model.training
    assert [token for place, token in told if place == 0] == found[0]
    assert [place for place, _ in told] == [0, 1] * 4


@pytest.mark.parametrize("lengths", [(3, 5), (15, 2)])
def test_a_text_ends_where_its_logits_stop_being_finite_and_others_go_on(lengths, monkeypatch):
    model = transformer(max_seq_len=16)
    prompts = [prompt(length) for length in lengths]
    healthy = continued(model, prompts, number=40)
    original, calls = decode._logits, []

    def failing(model, ids, cache):
        logits = original(model, ids, cache)
        calls.append(1)
        if len(calls) >= 4:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(decode, "_logits", failing)
    assert continued(model, prompts, number=40) == [healthy[0][:3], healthy[1]]


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_of_no_token_or_beyond_the_context_is_refused(length):
    with pytest.raises(ValueError, match=f"a prompt has {length} tokens; must have 1 to 16"):
        continued(transformer(max_seq_len=16), [prompt(3), prompt(length)], number=2)


def test_a_word_that_the_tokenizer_has_not_is_never_drawn():
    model = transformer(vocab_size=64, max_seq_len=16)
    given = {"max_new_tokens": 40, "sampling": DRAWN, "seed": 0}
    (free,) = continue_prompts(model, [[1, 2]], **given)
    assert max(free) >= 8
    (bound,) = continue_prompts(model, [[1, 2]], vocab_size=8, **given)
    assert len(bound) == 40 and max(bound) < 8
