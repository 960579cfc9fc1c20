import math

import pytest
import torch

from src.stability import RunFacts
from src.stability.ema import EmaConfig
from tests.builders import moe_config, router_config, transformer
from tests.runs import assert_same_tree
from tests.training.harness import Harness, Poison, guard_config, recipe_config

NAN, INF = math.nan, math.inf


def average():
    facts = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)
    return EmaConfig(decay=0.9, horizon_frac=None).callbacks(facts)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("what", "value"), [("loss", NAN), ("loss", INF), ("gradient", NAN), ("gradient", -INF)]
)
def test_a_skipped_step_leaves_all_state_bitwise_and_the_next_one_goes_on(what, value, accumulate):
    run = Harness(
        recipe=recipe_config(accumulate=accumulate),
        callbacks=[Poison({3}, what=what, value=value), *average()],
    ).fit()
    after = run.states[accumulate - 1 :: accumulate]
    assert_same_tree(after[1], after[2])
    assert not torch.equal(
        after[2]["weights"]["model.head.weight"], after[3]["weights"]["model.head.weight"]
    )
    assert any(
        not torch.equal(after[3]["weights"][k], after[2]["weights"][k])
        for k in after[2]["weights"]
        if "bias_E" in k
    )
    assert after[-1]["updates"] == [5]
    assert run.trainer.global_step == 6
    summary = run.step_guard.summary()
    assert summary["skipped_steps"] == 1
    assert summary["first_nonfinite_step"] == 3
    assert summary["nonfinite_loss_steps"] == (what == "loss")
    assert all(
        value.isfinite().all()
        for value in after[-1]["weights"].values()
        if value.is_floating_point()
    )


def test_the_schedule_and_the_data_go_on_over_a_skipped_step():
    linear = recipe_config(schedule="linear")
    healthy = Harness(recipe=linear).fit()
    skipping = Harness(recipe=linear, callbacks=[Poison({3}, what="gradient")]).fit()
    rates = [
        run.trainer.lr_scheduler_configs[0].scheduler.last_epoch for run in (healthy, skipping)
    ]
    assert rates == [6, 6]
    # The loss of step 3 comes from the same weights and the same batch.
    assert torch.equal(
        healthy.states[1]["weights"]["model.head.weight"],
        skipping.states[1]["weights"]["model.head.weight"],
    )


def test_without_incidents_the_guard_changes_nothing():
    watched = Harness().fit()
    blind = Harness(guard=guard_config(check=[])).fit()
    assert_same_tree(watched.states, blind.states)


def test_what_is_not_checked_is_counted_and_let_through():
    run = Harness(
        guard=guard_config(check=["loss"]), callbacks=[Poison({3}, what="gradient")]
    ).fit()
    summary = run.step_guard.summary()
    # Step 3 went through; what it did to the weights makes the loss of steps 4 to 6 non-finite.
    assert summary["skipped_steps"] == 3
    assert summary["first_nonfinite_step"] == 3
    assert run.states[2]["weights"]["model.embedding.weight"].isnan().any()


def test_stop_ends_the_run_in_order():
    run = Harness(
        guard=guard_config(on_nonfinite="stop"), callbacks=[Poison({3}, what="loss")]
    ).fit()
    assert run.step_guard.stopped
    assert run.trainer.global_step == 3


def test_raise_fails_with_the_step_and_what_was_wrong():
    run = Harness(
        guard=guard_config(on_nonfinite="raise"), callbacks=[Poison({2}, what="gradient")]
    )
    with pytest.raises(FloatingPointError, match="step 2: non-finite gradients"):
        run.fit()


@pytest.mark.parametrize(("steps", "reached"), [({2, 3}, 3), ({2, 4, 6}, 6)])
def test_max_consecutive_counts_steps_in_a_row(steps, reached):
    run = Harness(
        guard=guard_config(max_consecutive=2), callbacks=[Poison(steps, what="gradient")]
    ).fit()
    assert run.trainer.global_step == reached
    assert run.step_guard.stopped == (reached == 3)


def test_counters_are_logged_and_survive_save_and_load():
    run = Harness(callbacks=[Poison({3, 6}, what="loss")]).fit()
    assert run.recorder.lines[6]["guard/skipped"] == 2
    assert run.recorder.lines[2]["guard/skipped"] == 0
    other = Harness().step_guard
    other.load_state_dict(run.step_guard.state_dict())
    assert other.summary() == run.step_guard.summary()
    # One of the last seventh's steps (step 6 of 6) was skipped.
    assert other.summary()["skipped_tail_frac"] == 1.0


def test_the_logged_norm_is_that_of_the_gradient_before_clipping():
    bound = 1e-3
    norms = {}
    for clip in (None, bound):
        run = Harness(recipe=recipe_config(clip_norm=clip, max_steps=1)).fit()
        norms[clip] = run.recorder.lines[1]["grad/norm"]
    assert norms[None] == norms[bound] > 10 * bound


def test_router_bias_of_an_update_on_batch_is_outside_the_promise():
    ffn = moe_config(router=router_config(update_on="batch"))
    model = transformer(ffn=ffn, max_seq_len=8)
    run = Harness(model=model, callbacks=[Poison({3}, what="loss")]).fit()
    before, after = run.states[1]["weights"], run.states[2]["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("bias_E" in name for name in moved)
