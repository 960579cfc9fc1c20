import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.config.compose import compose
from src.stability import RunFacts
from src.stability.spam import Spam, SpamConfig
from tests.runs import last_checkpoint, record
from tests.stability.harnessed import figure, first_difference, runs
from tests.stability.resumed import Jolt, assert_absent, assert_resumed_is_whole
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=40, log_every=1, seed=0, repeat=0, clip_norm=None)
VALUES = {"theta": 20.0, "reset_every": 12, "warmup_steps": 5, "clip_after": 4}
BETAS, EPS, RATE = (0.9, 0.95), 1e-8, 0.01


def config(**changes) -> SpamConfig:
    return SpamConfig(**(VALUES | changes))


def spam(**changes) -> Spam:
    (remedy,) = config(**changes).callbacks(FACTS)
    return remedy


def feed(
    remedy: Spam, optimizer: torch.optim.Optimizer, gradients: list[np.ndarray], step: int
) -> None:
    """One optimizer step of the number `step` with the remedy."""
    (group,) = optimizer.param_groups
    group["lr"] = RATE * remedy.config.lr_factor(step - 1, 99)
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient.copy())
    trainer = SimpleNamespace(
        global_step=step - 1, callbacks=[], optimizers=[optimizer], should_stop=False, max_steps=99
    )
    remedy.log_at = lambda *_: None
    remedy.on_before_optimizer_step(trainer, None, optimizer)
    optimizer.step()
    remedy.on_step_end(trainer, None, step)


def authors(weight: np.ndarray, gradients: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """The published optimizer in the authors' terms: total_step, current_step, death rate.

    Epsilon alone is torch's, which adds it after the bias correction.

    Returns:
        The weights, and how many entries were clipped.
    """
    num_clipped = 0
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    every, warmup, accu = VALUES["reset_every"], VALUES["warmup_steps"], VALUES["clip_after"]
    current = warmup + 1
    for total, raw in enumerate(gradients):
        g, t = raw.copy(), total + 1
        angle = math.pi * current / (warmup + 1)
        scale = 1 - (0.0 if current >= warmup else 0.99 * (1 + math.cos(angle)) / 2)
        if t % every == 0:
            m, v = np.zeros_like(weight), np.zeros_like(weight)
        if t >= accu and t % every >= accu:
            mask = g**2 > VALUES["theta"] * v
            g[mask] = np.sign(g[mask]) * np.sqrt(v[mask] * VALUES["theta"])
            num_clipped += int(mask.sum())
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        bias1, bias2 = (1 - b**t for b in BETAS)
        weight = weight - RATE * scale * math.sqrt(bias2) / bias1 * m / (
            np.sqrt(v) + EPS * math.sqrt(bias2)
        )
        current += 1
        if (t + 1) % every == 0:
            current = 0
    return weight, num_clipped


@pytest.mark.parametrize("length", [11, 16, 40])
def test_the_trajectory_is_that_of_the_published_optimizer(length):
    draw = np.random.default_rng(0)
    start = draw.normal(size=(4, 6))
    gradients = [draw.normal(size=(4, 6)) for _ in range(length)]
    for number, entry in ((8, (1, 2)), (9, (3, 3)), (20, (0, 0)), (37, (2, 5))):
        if number <= length:
            gradients[number - 1][entry] = -300.0
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    remedy = spam()
    for step, gradient in enumerate(gradients, start=1):
        feed(remedy, optimizer, [gradient], step)
    weight, num_clipped = authors(start, gradients)
    np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=0, atol=1e-9)
    assert int(remedy.num_clipped) == num_clipped > 0
    assert remedy.num_resets == {11: 1, 16: 1, 40: 3}[length]


def test_the_factor_is_one_until_the_first_reset_and_rises_after_each():
    factors = [config().lr_factor(step, 99) for step in range(30)]
    assert factors[:11] == [1.0] * 11
    expected = [1 - 0.99 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(5)]
    assert factors[11:16] == pytest.approx(expected)
    assert expected[0] == pytest.approx(0.01)
    assert factors[16:23] == [1.0] * 7
    assert factors[23:28] == factors[11:16]


def test_nothing_is_clipped_while_the_second_moment_is_new():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS)
    remedy = spam()
    counts = []
    for step in range(1, 20):
        feed(remedy, optimizer, [np.array([1.0, 2.0, 3.0]) * 100.0**step], step)
        counts.append(int(remedy.num_clipped))
    # All three entries are clipped in steps 4 to 11 and 16 to 19: 12 begins again.
    assert counts == [max(0, n - 3) * 3 for n in range(1, 12)] + [24] * 4 + [27, 30, 33, 36]


def test_an_entry_that_has_had_no_gradient_yet_is_not_zeroed_for_ever():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, weight_decay=0.0)
    remedy = spam()
    for step in range(1, 8):
        feed(remedy, optimizer, [np.array([1.0, 0.0])], step)
    feed(remedy, optimizer, [np.array([1.0, 0.5])], 8)
    assert weight.grad[1].item() == 0.5
    assert weight[1].item() != 0.0
    assert int(remedy.num_clipped) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_entry_is_left_to_the_guard(bad):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=RATE)
    remedy = spam(theta=5000.0)
    for step in range(1, 7):
        feed(remedy, optimizer, [np.array([1.0, 1.0], dtype=np.float32)], step)
    feed(remedy, optimizer, [np.array([1.0, bad], dtype=np.float32)], 7)
    assert str(weight.grad[1].item()) == str(bad)
    assert int(remedy.num_clipped) == 0


def test_a_bound_that_is_never_reached_is_bitwise_the_baseline():
    run = assert_absent(spam(theta=1e12, reset_every=100), max_steps=10)
    assert run.recorder.lines[10]["stability/spam_clipped_frac"] == 0
    assert run.recorder.lines[10]["stability/spam_resets"] == 0
    assert run.recorder.lines[10]["stability/spam_rate_factor"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [4, 5, 8])
def test_interrupted_and_resumed_is_uninterrupted(accumulate, stop_at, tmp_path):
    """Before a reset, right after one, and after a step that was clipped."""
    whole = assert_resumed_is_whole(
        lambda: [
            Jolt(8, factor=100.0),
            spam(theta=30.0, reset_every=6, warmup_steps=2, clip_after=2),
        ],
        tmp_path / "s.ckpt",
        stop_at=stop_at,
        recipe={"max_steps": 10, "accumulate": accumulate, "clip_norm": None},
    )
    lines = whole.recorder.lines
    # Of optimizer steps, whatever the number of micro-batches: before step 6.
    assert [lines[n]["stability/spam_resets"] for n in (4, 5, 10)] == [0, 1, 1]
    assert lines[8]["stability/spam_clipped_frac"] > lines[7]["stability/spam_clipped_frac"]
    assert not whole.states[5 * accumulate - 1]["optimizer"][0]["exp_avg_sq"].any()


def test_a_skipped_step_does_not_leave_out_a_reset():
    remedy = spam(reset_every=5, warmup_steps=0, clip_after=2)
    run = Harness(
        recipe=recipe_config(max_steps=8), callbacks=[Poison({4, 5}, what="gradient"), remedy]
    ).fit()
    assert run.step_guard.summary()["skipped_steps"] == 2
    assert remedy.num_resets == 1
    assert not run.states[4]["optimizer"][0]["exp_avg"].any()
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_spam_acts_on_gradients_rate_and_moments(tiny):
    fields = ("theta=2", "reset_every=10", "warmup_steps=4", "clip_after=3")
    plain, treated = runs(tiny, "spam", *(f"stability.spam.{field}" for field in fields))
    assert first_difference(plain, treated) in (2, 3, 4)
    assert record(treated)["outcome"] == "clean"
    assert 0 < figure(treated, "stability/spam_clipped_frac")[22] < 1
    assert figure(treated, "stability/spam_resets")[22] == 2
    rates, base = figure(treated, "lr"), figure(plain, "lr")
    assert rates[10] == pytest.approx(0.01 * base[10])
    assert rates[9] == base[9]
    assert figure(treated, "stability/spam_rate_factor")[10] == pytest.approx(0.01)
    (state,) = [
        s for name, s in last_checkpoint(treated)["callbacks"].items() if name.startswith("Spam")
    ]
    assert state["num_resets"] == 2


def test_an_optimizer_without_moments_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    ones = np.ones(2, dtype=np.float32)
    feed(remedy := spam(), optimizer, [ones], 1)
    with pytest.raises(ValueError, match="optimizer=SGD: spam needs one that keeps"):
        feed(remedy, optimizer, [ones], 2)


def test_it_says_where_it_has_no_effect():
    notes = compose("train", ["stability=spam", "recipe.max_steps=20"]).notes
    assert "stability=spam changes nothing here: clip_after is 20" in notes[-1]


@pytest.mark.parametrize(
    "change",
    [{"theta": 0.0}, {"reset_every": 1}, {"warmup_steps": 12}, {"clip_after": 0}],
)
def test_impossible_values_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{name}={value}"):
        config(**change)
