import pytest
import torch

from src.training import loss
from src.training.loss import chunked_cross_entropy, cross_entropy
from src.watch import ActivationWatch
from tests.builders import transformer
from tests.training.harness import Harness, recipe_config

VOCAB = 600


def parts(rows=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    model = transformer(vocab_size=VOCAB, max_seq_len=96)
    tokens, targets = torch.randint(VOCAB, (2, rows, 96), generator=draw)
    return model, tokens, targets


@pytest.fixture
def chunked(monkeypatch):
    """A vocabulary of tests is a large one; the calls are counted."""
    calls = []

    def counted(states, head, targets):
        calls.append(targets.numel())
        return chunked_cross_entropy(states, head, targets)

    monkeypatch.setattr(loss, "CHUNKED_VOCAB", VOCAB)
    monkeypatch.setattr(loss, "chunked_cross_entropy", counted)
    return calls


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(autocast):
    found = {}
    for name in ("whole", "chunked"):
        model, tokens, targets = parts()
        assert targets.numel() > loss.CHUNK
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "whole":
                value = cross_entropy(model(tokens), targets).mean()
            else:
                value = chunked_cross_entropy(model.states(tokens), model.head, targets)
        value.backward()
        assert value.dtype == torch.float32
        found[name] = {"loss": value.detach()} | {n: p.grad for n, p in model.named_parameters()}
    for name, expected in found["whole"].items():
        # Sums in another order; under autocast the two round their products to bf16 differently.
        atol = (0.02 if autocast else 1e-5) * expected.abs().max().item()
        torch.testing.assert_close(found["chunked"][name], expected, rtol=0, atol=atol)


def test_a_training_step_takes_it_from_a_large_vocabulary_on(chunked):
    model, tokens, targets = parts()
    whole = cross_entropy(model(tokens), targets).mean().item()
    given = loss.losses(model, tokens, targets, z_loss_weight=0.0)
    assert given["loss"].item() == pytest.approx(whole, rel=1e-6)
    assert chunked == [targets.numel()]


def test_where_it_saves_nothing_or_cannot_serve_all_logits_are_there(chunked, monkeypatch):
    model, tokens, targets = parts()
    few = tokens[:1, : model.head.in_features - 1], targets[:1, : model.head.in_features - 1]
    loss.losses(model, *few, z_loss_weight=0.0)
    loss.losses(model, tokens, targets, z_loss_weight=1e-4)
    with torch.no_grad():
        loss.losses(model, tokens, targets, z_loss_weight=0.0)
    monkeypatch.setattr(loss, "CHUNKED_VOCAB", VOCAB + 1)
    loss.losses(model, tokens, targets, z_loss_weight=0.0)
    assert chunked == []


def test_its_logsumexp_is_seen_as_that_of_all_logits(chunked, monkeypatch):
    lines = []
    for vocab in (VOCAB, VOCAB + 1):
        monkeypatch.setattr(loss, "CHUNKED_VOCAB", vocab)
        model = transformer(vocab_size=VOCAB, max_seq_len=96)
        run = Harness(
            recipe=recipe_config(max_steps=1, batch_size=4, seq_len=96),
            callbacks=[ActivationWatch(every=1)],
            model=model,
        )
        lines.append(run.fit().recorder.lines[1])
    assert len(chunked) == 1
    assert lines[0]["output/logsumexp"] == pytest.approx(lines[1]["output/logsumexp"], rel=1e-6)
