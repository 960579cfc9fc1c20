import numpy as np
import pytest
import torch

from src.stability import RunFacts
from src.stability.stable_adamw import StableAdamWConfig, UpdateClipping
from tests.runs import record
from tests.stability.harnessed import figure, first_difference, runs
from tests.stability.resumed import (
    Jolt,
    assert_absent,
    assert_resumed_is_whole,
    assert_sharded_is_refused,
)
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=12, log_every=1, seed=0, repeat=0, clip_norm=None)
BETAS, EPS, RATE, DECAY = (0.9, 0.95), 1e-6, 0.01, 0.1


def remedy(max_rms: float = 1.0) -> UpdateClipping:
    (callback,) = StableAdamWConfig(max_rms=max_rms).callbacks(FACTS)
    return callback


def papers_weights(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """Algorithm 2 of arXiv 2304.13013, with its debiased betas, in float64."""
    v, u = np.zeros_like(weight), np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        beta1, beta2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        v = beta1 * v + (1 - beta1) * g
        u = beta2 * u + (1 - beta2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(u, EPS**2)))
        rate = RATE / max(1.0, rms)
        weight = weight - rate * DECAY * weight - rate * v / (np.sqrt(u) + EPS)
    return weight


def ours(weight: np.ndarray, gradients: list[np.ndarray], callback: UpdateClipping) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer.register_step_post_hook(callback._after_update)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        callback.on_before_optimizer_step(None, None, optimizer)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("jump", [1.0, 30.0])
def test_the_trajectory_is_that_of_the_papers_algorithm(jump):
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(4, 6))
    gradients = [draw.normal(size=(4, 6)) * (jump if t >= 8 else 1.0) for t in range(12)]
    callback = remedy()
    found = ours(weight, gradients, callback).numpy()
    np.testing.assert_allclose(found, papers_weights(weight, gradients), rtol=0, atol=1e-6)
    assert int(callback.num_scaled) > 0
    if jump > 1:
        # The decoupled AdamW alone is elsewhere: what is compared is the scaling.
        alone = ours(weight, gradients, remedy(max_rms=1e6)).numpy()
        assert np.abs(alone - found).max() > 1e-3


def test_each_tensor_is_scaled_by_its_own_rms():
    calm, wild = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    optimizer = torch.optim.AdamW([calm, wild], lr=RATE, betas=BETAS, weight_decay=0.0)
    callback = remedy(max_rms=1.5)
    optimizer.register_step_post_hook(callback._after_update)
    for step in range(20):
        calm.grad, wild.grad = torch.ones(50), torch.full((50,), 100.0 if step == 19 else 1.0)
        before = [p.detach().clone() for p in (calm, wild)]
        callback.on_before_optimizer_step(None, None, optimizer)
        optimizer.step()
    moved = [(p.detach() - b).abs().max().item() for p, b in zip((calm, wild), before, strict=True)]
    assert moved[0] == pytest.approx(RATE, rel=1e-3)
    assert moved[1] < 0.7 * RATE
    assert int(callback.num_scaled) == 1
    assert callback.rms_max.item() > 3


def test_a_jump_below_epsilon_is_none():
    """The divisor is at least eps^2: AdamW itself hardly moves such an entry."""
    for scale, is_scaled in ((1e-3 * EPS, False), (1e3 * EPS, True)):
        callback = remedy()
        gradients = [np.full(6, scale * (100.0 if t == 9 else 1.0)) for t in range(10)]
        ours(np.zeros(6), gradients, callback)
        assert (callback.rms_max.item() > 2) is is_scaled


def test_a_bound_that_is_never_reached_is_bitwise_the_baseline():
    run = assert_absent(remedy(max_rms=1e9), max_steps=8)
    assert {run.recorder.lines[n]["stability/stable_adamw_scaled"] for n in range(1, 9)} == {0.0}
    assert all(run.recorder.lines[n]["stability/stable_adamw_rms_max"] > 0 for n in range(1, 9))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(accumulate, tmp_path):
    whole = assert_resumed_is_whole(
        lambda: [Jolt(6), remedy()],
        tmp_path / "s.ckpt",
        stop_at=5,
        recipe={"max_steps": 9, "accumulate": accumulate, "clip_norm": None},
    )
    lines = whole.recorder.lines
    assert lines[6]["stability/stable_adamw_scaled"] > lines[5]["stability/stable_adamw_scaled"]
    # At step 6 the second moment holds at least 0.05 / (1 - 0.95^6) of g^2: at most 2.3.
    assert lines[6]["stability/stable_adamw_rms_max"] > 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_leaves_no_trace(what):
    run = Harness(recipe=recipe_config(max_steps=6), callbacks=[Poison({3}, what=what), remedy()])
    run.fit()
    assert run.step_guard.summary()["skipped_steps"] == 1
    for name in run.states[1]["weights"]:
        assert torch.equal(run.states[1]["weights"][name], run.states[2]["weights"][name])
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())
    assert run.recorder.lines[6]["stability/stable_adamw_rms_max"] > 0


def test_stable_adamw_acts_and_says_how_often(tiny):
    plain, treated = runs(tiny, "stable_adamw")
    assert first_difference(plain, treated) in (1, 2, 3)
    assert record(treated)["outcome"] == "clean"
    scaled = figure(treated, "stability/stable_adamw_scaled")
    assert 0 < scaled[5] < scaled[22]


def test_an_optimizer_without_moments_is_refused():
    callback, weight = remedy(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(callback._after_update)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="optimizer=SGD: stable_adamw needs one that keeps"):
        optimizer.step()


def test_sharded_tensors_are_refused():
    assert_sharded_is_refused(remedy(), "stable_adamw")
