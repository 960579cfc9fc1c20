import math

import numpy as np
import pytest
import torch

from src.config.compose import compose
from src.stability import RunFacts
from src.stability.adagc import AdaGC, AdaGCConfig
from tests.runs import record
from tests.stability.harnessed import figure, first_difference, runs
from tests.stability.resumed import (
    Jolt,
    assert_absent,
    assert_resumed_is_whole,
    assert_sharded_is_refused,
)
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=99, log_every=1, seed=0, repeat=0, clip_norm=None)
VALUES = {"max_norm": 1.0, "ratio": 1.05, "beta": 0.98, "warmup_steps": 4}


def adagc(num_params: int | None = None, **changes) -> AdaGC:
    (remedy,) = AdaGCConfig(**(VALUES | changes)).callbacks(FACTS)
    if num_params is not None:
        remedy.gamma = torch.full((num_params,), math.inf)
    return remedy


def feed(remedy: AdaGC, gradients: list[np.ndarray | None], step: int) -> list[np.ndarray]:
    """The gradients of one step after the remedy; None: the parameter has none."""
    tensors = [torch.from_numpy(g.copy()) for g in gradients if g is not None]
    remedy.numbered = [(n, None) for n, g in enumerate(gradients) if g is not None]
    remedy.change(tensors, norm=torch.nn.utils.get_total_norm(tensors), step=step)
    return [tensor.numpy() for tensor in tensors]


def papers(steps: list[list[np.ndarray]], **changes) -> tuple[list[list[np.ndarray]], list[float]]:
    """Algorithm 1 of arXiv 2502.11034, with its names: what the optimizer gets, and gamma."""
    values = VALUES | changes
    gamma: list[float] = [math.inf] * len(steps[0])
    given = []
    for t, gradients in enumerate(steps, start=1):
        total = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        row = []
        for i, g in enumerate(gradients):
            if t < values["warmup_steps"]:
                clipped = min(values["max_norm"] / total, 1.0) * g
                gamma[i] = min(gamma[i], float(np.linalg.norm(clipped)))
            else:
                clipped = min(values["ratio"] * gamma[i] / float(np.linalg.norm(g)), 1.0) * g
                norm = float(np.linalg.norm(clipped))
                gamma[i] = values["beta"] * gamma[i] + (1 - values["beta"]) * norm
            row.append(clipped)
        given.append(row)
    return given, gamma


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_the_gradients_are_those_of_the_papers_algorithm(scale):
    draw = np.random.default_rng(0)
    shapes = ((3, 4), (5,), (2, 2))
    steps = [
        [scale * draw.normal(size=s) * (40 if t == 7 and s == (5,) else 1) for s in shapes]
        for t in range(12)
    ]
    remedy = adagc(3)
    found = [feed(remedy, gradients, step) for step, gradients in enumerate(steps, start=1)]
    expected, gamma = papers(steps)
    for one, two in zip(found, expected, strict=True):
        for mine, theirs in zip(one, two, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    np.testing.assert_allclose(remedy.gamma.numpy(), gamma, rtol=1e-5)
    assert int(remedy.num_clipped) > 0
    assert remedy.num_warmup_clipped == (3 if scale > 1 else 0)


def test_one_tensors_spike_leaves_the_others_as_they_are():
    remedy = adagc(2)
    for step in range(1, 9):
        feed(remedy, [np.full(4, 0.1), np.full(4, 0.1)], step)
    calm, wild = feed(remedy, [np.full(4, 0.1), np.full(4, 100.0)], 9)
    np.testing.assert_array_equal(calm, np.full(4, 0.1))
    np.testing.assert_allclose(np.linalg.norm(wild), 1.05 * 0.2, rtol=1e-5)
    assert remedy.factor_min.item() == pytest.approx(1.05 * 0.2 / 200)
    assert int(remedy.num_clipped) == 1


@pytest.mark.parametrize("step", [1, 3])
def test_a_tensor_without_a_gradient_for_a_step_is_not_frozen_for_ever(step):
    remedy = adagc(2)
    for number in range(1, 9):
        expert = 0.0 if number == step else 0.1
        feed(remedy, [np.full(4, 0.1), np.full(4, expert)], number)
    np.testing.assert_allclose(feed(remedy, [np.full(4, 0.1)] * 2, 9)[1], np.full(4, 0.1))
    assert remedy.gamma[1].item() == pytest.approx(0.2)


def test_averages_belong_to_parameters_and_not_to_places_among_the_gradients():
    remedy = adagc(3)
    for step in range(1, 9):
        feed(remedy, [np.full(4, 1e-3), None, np.full(4, 0.1)], step)
    assert remedy.gamma.tolist() == pytest.approx([2e-3, math.inf, 0.2])
    # Its first gradient comes late: it is not clipped, and starts the average.
    _, late, _ = feed(remedy, [np.full(4, 1e-3), np.full(4, 5.0), np.full(4, 0.1)], 9)
    np.testing.assert_array_equal(late, np.full(4, 5.0))
    assert remedy.gamma[1].item() == pytest.approx(10.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [2, 9])
def test_one_non_finite_norm_does_not_poison_it(bad, step):
    remedy = adagc(1)
    for number in range(1, step):
        feed(remedy, [np.full(4, 0.1)], number)
    before = {name: torch.as_tensor(value).clone() for name, value in remedy.state_dict().items()}
    feed(remedy, [np.array([bad, 0.1, 0.1, 0.1])], step)
    for name, value in remedy.state_dict().items():
        assert torch.equal(torch.as_tensor(value), before[name])


def test_bounds_that_are_never_reached_are_bitwise_the_baseline():
    loose = adagc(max_norm=1e9, ratio=1e9)
    run = assert_absent(loose, max_steps=8, clip_norm=None)
    assert run.recorder.lines[8]["stability/adagc_clipped"] == 0
    assert run.recorder.lines[8]["stability/adagc_warmup_clipped"] == 0
    assert run.recorder.lines[8]["stability/adagc_factor_min"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [2, 6])
def test_interrupted_and_resumed_is_uninterrupted(accumulate, stop_at, tmp_path):
    whole = assert_resumed_is_whole(
        lambda: [Jolt(7), adagc()],
        tmp_path / "s.ckpt",
        stop_at=stop_at,
        recipe={"max_steps": 9, "accumulate": accumulate, "clip_norm": None},
    )
    lines = whole.recorder.lines
    # Warm-up counts optimizer steps: tensors are clipped from the fourth on.
    assert lines[3]["stability/adagc_clipped"] == 0 < lines[4]["stability/adagc_clipped"]
    assert lines[7]["stability/adagc_factor_min"] < 1e-3


def test_a_non_finite_step_of_a_run_leaves_its_state_as_it_was():
    remedy = adagc()
    run = Harness(
        recipe=recipe_config(max_steps=6, clip_norm=None),
        callbacks=[Poison({2, 5}, what="gradient"), remedy],
    ).fit()
    assert run.step_guard.summary()["skipped_steps"] == 2
    assert all(0 < gamma < math.inf for gamma in remedy.gamma.tolist())
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_adagc_takes_the_place_of_the_fixed_bound_and_acts(tiny):
    assert compose("train", ["stability=adagc"]).recipe.clip_norm is None
    plain, treated = runs(tiny, "adagc", "stability.adagc.warmup_steps=4")
    assert first_difference(plain, treated) in (1, 2, 3, 4, 5)
    assert record(treated)["outcome"] == "clean"
    assert figure(treated, "stability/adagc_clipped")[22] > 0
    assert figure(treated, "grad/clip_frac") == {}


def test_sharded_tensors_are_refused():
    assert_sharded_is_refused(adagc(), "adagc")


@pytest.mark.parametrize(
    "change", [{"max_norm": 0.0}, {"ratio": math.inf}, {"beta": 1.0}, {"warmup_steps": 1}]
)
def test_impossible_values_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{name}={value}"):
        adagc(**change)
