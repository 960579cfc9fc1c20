import math
import random

import pytest

from nonfinite.lightning.spikes import SpikeScore, SpikeWatch
from tests.training.harness import Harness, Poison, recipe_config


def noise(count: int) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(2.0, 0.1) for _ in range(count)]


def test_noise_has_no_spikes_and_a_jump_of_seven_sigma_is_one():
    score = SpikeScore()
    assert not any(score.add(value) for value in noise(300))
    assert score.add(2.0 + 7 * 0.12)
    assert not score.add(2.0)
    assert score.score == pytest.approx(1 / 302)


def test_spikes_stay_out_of_the_window():
    score = SpikeScore()
    for value in noise(200):
        score.add(value)
    # If the first entered the window it would widen the band for the second.
    assert all(score.add(100.0) for _ in range(20))


def test_a_non_finite_value_is_a_spike_from_the_first_on_and_poisons_nothing():
    score = SpikeScore()
    assert score.add(math.nan)
    assert score.add(math.inf)
    for value in noise(100):
        score.add(value)
    assert score.num_spikes == 2


def test_the_state_makes_it_again():
    one, two = SpikeScore(), SpikeScore()
    values = noise(150)
    for value in values[:100]:
        one.add(value)
    two.load_state_dict(one.state_dict())
    for value in [*values[100:], 9.0]:
        assert one.add(value) == two.add(value)
    assert one.state_dict() == two.state_dict()


def test_the_watch_counts_every_step_whatever_the_interval():
    run = Harness(recipe=recipe_config(max_steps=7))
    watch = SpikeWatch(run.step_guard, every=3)
    run.callbacks = [watch, Poison({4}, what="loss")]
    run.fit()
    summary = watch.summary()
    assert summary["loss_score"] == pytest.approx(1 / 7)
    norms = {step: line["grad/norm"] for step, line in run.recorder.lines.items()}
    finite = {step: norm for step, norm in norms.items() if math.isfinite(norm)}
    assert summary["grad_norm_max_step"] == max(finite, key=finite.get)
    assert summary["grad_norm_max"] == pytest.approx(max(finite.values()))
    assert run.recorder.lines[7]["spike/loss_score"] == pytest.approx(1 / 7)


def test_large_norms_are_counted_by_both_measures():
    watch = SpikeWatch(Harness().step_guard, every=1)
    for norm in noise(100):
        assert not watch._is_large(norm)
    assert watch._is_large(11.0)  # over 5 medians of 2
    assert watch._is_large(101.0)
    assert watch._is_large(math.inf)
    assert (watch.num_over_median, watch.num_over_100) == (2, 1)


def test_the_wide_definition_asks_for_more():
    values = [*noise(300), 2.0 + 6.5 * 0.1]
    narrow, wide = SpikeScore(), SpikeScore(sigmas=7.0, window=1000)
    assert [narrow.add(v) for v in values][-1] != [wide.add(v) for v in values][-1]
    assert len(wide.window) == 301
