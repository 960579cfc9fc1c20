import pytest
import torch
import torch.nn.functional as F

from src.training.loss import cross_entropy
from src.training.metrics import TrainMetrics
from tests.builders import FFN_CASES, transformer
from tests.training.harness import Harness, recipe_config


def with_metrics(**recipe):
    config = recipe_config(**recipe)
    metrics = TrainMetrics(
        tokens_per_step=16, max_steps=config.max_steps, log_every=config.log_every
    )
    return config, metrics


def test_two_micro_batches_make_the_step_of_one_batch_twice_as_large():
    small = Harness(recipe=recipe_config(accumulate=2, max_steps=1, clip_norm=None))
    large = Harness(recipe=recipe_config(batch_size=4, max_steps=1, clip_norm=None))
    batches = []
    small.task.on_train_batch_start = lambda batch, batch_idx: batches.append(batch)
    small.fit()
    both = tuple(torch.cat(part) for part in zip(*batches, strict=True))
    large.task.on_train_batch_start = lambda batch, batch_idx: [
        old.copy_(new) for old, new in zip(batch, both, strict=True)
    ]
    large.fit()
    norms = [run.recorder.lines[1]["grad/norm"] for run in (small, large)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    counts = [run.task.model.routers()[0].last_counts_E for run in (small, large)]
    assert torch.equal(*counts)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    seen = []
    run = Harness(recipe=recipe_config(clip_norm=0.05, max_steps=3))
    inner = run.task.configure_gradient_clipping

    def clip(*args, **kwargs):
        inner(*args, **kwargs)
        grads = [p.grad for p in run.task.parameters() if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(grads).item())

    run.task.configure_gradient_clipping = clip
    run.fit()
    assert seen == [pytest.approx(0.05, rel=1e-4)] * 3


def test_train_loss_is_cross_entropy_alone_with_other_losses_beside_it():
    recipe, metrics = with_metrics(max_steps=1)
    model = transformer(ffn=FFN_CASES["moe-aux"], max_seq_len=8)
    run = Harness(recipe=recipe, model=model, callbacks=[metrics])
    batches = []
    run.task.on_train_batch_start = lambda batch, batch_idx: batches.append(batch)
    fresh = transformer(ffn=FFN_CASES["moe-aux"], max_seq_len=8)
    run.fit()
    ids, targets = batches[0]
    expected = F.cross_entropy(fresh(ids).flatten(0, 1), targets.flatten()).item()
    assert run.recorder.lines[1]["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert run.recorder.lines[1]["train/router_balance"] > 0


def test_logged_means_cover_the_steps_since_the_last_line():
    every, metrics_one = with_metrics(log_every=1)
    some, metrics_three = with_metrics(log_every=3)
    one = Harness(recipe=every, callbacks=[metrics_one]).fit().recorder.lines
    three = Harness(recipe=some, callbacks=[metrics_three]).fit().recorder.lines
    assert sorted(three) == [1, 3, 6]
    for name in ("train/loss", "grad/clip_frac"):
        mean = sum(one[step][name] for step in (4, 5, 6)) / 3
        assert three[6][name] == pytest.approx(mean, rel=1e-6)


def test_the_logged_rate_is_the_one_the_step_used():
    recipe, metrics = with_metrics(schedule="linear", warmup_frac=0.5)
    run = Harness(recipe=recipe, callbacks=[metrics])
    used = []
    run.task.on_before_optimizer_step = lambda optimizer: used.append(
        optimizer.param_groups[0]["lr"]
    )
    lines = run.fit().recorder.lines
    assert [lines[step]["lr"] for step in range(1, 7)] == pytest.approx(used)
    assert used[0] < used[2] > used[5]


def test_bf16_mixed_keeps_float32_weights_and_a_float32_loss(monkeypatch):
    run = Harness(recipe=recipe_config(precision="bf16-mixed", max_steps=1))
    dtypes = []

    def seen(logits, targets):
        loss = cross_entropy(logits, targets)
        dtypes.append((loss.dtype, logits.dtype))
        return loss

    monkeypatch.setattr("src.training.loss.cross_entropy", seen)
    run.fit()
    assert dtypes == [(torch.float32, torch.bfloat16)]
    assert {p.dtype for p in run.task.parameters()} == {torch.float32}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_gradient_of_an_earlier_step_lies_beside_the_activations_of_the_next(accumulate):
    run = Harness(recipe=recipe_config(accumulate=accumulate))
    there = []
    step = run.task.training_step

    def seen(batch, batch_idx):
        there.append(sum(p.grad is not None for p in run.task.parameters()) > 0)
        return step(batch, batch_idx)

    run.task.training_step = seen
    run.fit()
    assert there == [False, *[True] * (accumulate - 1)] * 6
