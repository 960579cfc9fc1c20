import math

import lightning.pytorch as pl
import pytest
import torch

from src.stability import RunFacts
from src.stability.spike_skip import SpikeSkip, SpikeSkipConfig
from tests.runs import assert_same_tree
from tests.stability.harnessed import first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

STEPS = 80
FACTS = RunFacts(max_steps=STEPS, log_every=1, seed=0, repeat=0, clip_norm=None)


class Jolt(pl.Callback):
    """Makes the gradient of one step ten thousand times larger, as a bad batch would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step + 1 == self.step:
            for parameter in pl_module.parameters():
                parameter.grad *= 1e4


def remedy() -> SpikeSkip:
    (callback,) = SpikeSkipConfig(sigmas=6.0).callbacks(FACTS)
    return callback


def harness(*callbacks: pl.Callback) -> Harness:
    recipe = recipe_config(max_steps=STEPS, learning_rate=1e-3, clip_norm=None)
    return Harness(recipe=recipe, callbacks=list(callbacks)).fit()


def test_an_outlying_step_is_dropped_with_all_state_as_it_was():
    skipping = remedy()
    run = harness(Jolt(70), skipping)
    assert_same_tree(run.states[68], run.states[69])
    assert skipping.num_skipped == 1
    assert run.recorder.lines[69]["stability/spike_skip_skipped"] == 0
    assert run.recorder.lines[70]["stability/spike_skip_skipped"] == 1
    # It is no non-finite step, and the guard's count does not call it one.
    assert run.step_guard.summary()["skipped_steps"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_steps_do_not_poison_its_window(value):
    skipping = remedy()
    run = harness(Poison({10, 40}, what="loss", value=value), Jolt(75), skipping)
    assert skipping.num_skipped == 1
    assert run.step_guard.summary()["skipped_steps"] == 2
    assert all(math.isfinite(v) for score in skipping.scores.values() for v in score.window)


def test_without_outliers_spike_skip_is_the_baseline(tiny):
    assert first_difference(*runs(tiny, "spike_skip")) is None


def test_it_says_that_it_needs_the_guard():
    run = Harness(callbacks=[remedy()])
    trainer = pl.Trainer(callbacks=[remedy()], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="needs a StepGuard"):
        remedy().on_before_optimizer_step(trainer, run.task, torch.optim.SGD(run.task.parameters()))


def test_a_new_level_is_skipped_for_a_while_and_not_for_ever():
    skipping = remedy()
    for index in range(128):
        skipping._judge("loss", 1.0 + 0.01 * (index % 2))
    skipped = [skipping._judge("loss", 1.1 + 0.01 * (index % 2)) for index in range(200)]
    assert skipped[0]
    assert not any(skipped[-100:])
