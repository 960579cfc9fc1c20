import pytest
import torch

from nonfinite.lightning import ActivationWatch
from nonfinite.rerun import undisturbed, watched
from src.training import loss
from src.training.loss import cross_entropy, linear_cross_entropy
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
    apply = loss._LinearCrossEntropy.apply

    def counted(states, weight, targets, dtype):
        calls.append(targets.numel())
        return apply(states, weight, targets, dtype)

    monkeypatch.setattr(loss, "CHUNKED_VOCAB", VOCAB)
    monkeypatch.setattr(loss._LinearCrossEntropy, "apply", counted)
    return calls


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(autocast, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    found = {}
    for name in ("whole", "chunked"):
        model, tokens, targets = parts()
        assert targets.numel() == 72 * loss.CHUNK
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "whole":
                value = cross_entropy(model(tokens), targets).mean()
            else:
                states = model.states(tokens).flatten(0, 1)
                value = linear_cross_entropy(states, model.head.weight, targets.flatten())
        value.backward()
        assert value.dtype == torch.float32
        found[name] = {"loss": value.detach()} | {n: p.grad for n, p in model.named_parameters()}
    # Only the order of sums differs; under autocast gradients of the logits are rounded to bf16,
    # 0.4 % of each, in both.
    torch.testing.assert_close(found["chunked"]["loss"], found["whole"]["loss"], rtol=1e-6, atol=0)
    for name, expected in found["whole"].items():
        error = (found["chunked"][name] - expected).norm() / expected.norm()
        assert error < (0.01 if autocast else 1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_chunks_are_float32(dtype, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(4096, 16, generator=draw).requires_grad_()
    weight = torch.randn(64, 16, generator=draw).mul_(0.5).requires_grad_()
    targets = torch.randint(3, (4096,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = linear_cross_entropy(states, weight, targets)
    grads = torch.autograd.grad(found, (states, weight))
    logits = states.double() @ weight.double().T
    exact = torch.nn.functional.cross_entropy(logits, targets)
    expected = torch.autograd.grad(exact, (states, weight))
    assert found.item() == pytest.approx(exact.item(), rel=1e-6 if dtype == torch.float32 else 1e-3)
    for one, two in zip(grads, expected, strict=True):
        # bf16 has 8 bits; summed in it, the weight's gradient over 512 chunks would be 5 % off.
        assert (one - two).norm() / two.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


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
    with watched():
        loss.losses(model, tokens, targets, z_loss_weight=0.0)
    # Whoever runs a step again to see what failed in it sees the head.
    with undisturbed(model):
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
