import pytest
import torch
import torch_ema
from lightning.pytorch.callbacks import EMAWeightAveraging

from src.stability import RunFacts
from src.stability.ema import EmaConfig, WeightAverage
from tests.runs import ROOT, assert_same_tree, last_checkpoint, metrics, train, weights
from tests.training.harness import Harness, Poison, guard_config, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)


def average(decay: float = 0.9) -> WeightAverage:
    (callback,) = EmaConfig(decay=decay, horizon_frac=None).callbacks(FACTS)
    return callback


def test_raw_weights_are_bitwise_the_baselines_and_the_average_is_evaluated_beside_them(tiny):
    plain = train(tiny, "stability=none")
    averaged = train(tiny, "stability=ema")
    assert_same_tree(weights(plain), weights(averaged))
    for one, two in zip(metrics(plain), metrics(averaged), strict=True):
        added = two.keys() - one.keys()
        assert one == {name: two[name] for name in one}
        assert all(name.startswith(("val_ema/", "stability/ema_")) for name in added)
    last = metrics(averaged)[-1]
    assert last["val_ema/loss"] != last["val/loss"]
    assert last["val_ema/nonfinite_frac"] == 0.0


def test_the_shadow_is_the_average_with_the_ramp_of_the_library():
    callback = average(decay=0.9)
    run = Harness(callbacks=[callback])
    initial = run.task.model.head.weight.detach().clone()
    run.fit()
    expected = initial
    for n, state in enumerate(run.states, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * state["weights"]["model.head.weight"]
        assert run.recorder.lines[n]["stability/ema_decay"] == pytest.approx(decay)
        assert run.recorder.lines[n]["stability/ema_updates"] == n
    index = [id(p) for p in run.task.parameters()].index(id(run.task.model.head.weight))
    torch.testing.assert_close(callback.average.shadow_params[index], expected)


def test_it_counts_optimizer_steps_under_accumulation():
    callback = average()
    Harness(recipe=recipe_config(accumulate=3), callbacks=[callback]).fit()
    assert callback.average.num_updates == 6


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_never_reaches_the_shadow(what):
    callback = average()
    Harness(callbacks=[callback, Poison({2, 5}, what=what)]).fit()
    assert callback.average.num_updates == 4
    assert all(shadow.isfinite().all() for shadow in callback.average.shadow_params)


def test_nor_does_one_that_the_guard_let_through():
    callback = average()
    guard = guard_config(check=["loss"])
    Harness(guard=guard, callbacks=[callback, Poison({4}, what="gradient")]).fit()
    # Steps 5 and 6 have a non-finite loss, from the weights that step 4 spoilt.
    assert callback.average.num_updates == 3
    assert all(shadow.isfinite().all() for shadow in callback.average.shadow_params)


def test_lightnings_own_average_takes_what_this_one_leaves_out():
    theirs = EMAWeightAveraging(decay=0.9)
    guard = guard_config(check=["loss"])
    Harness(guard=guard, callbacks=[theirs, Poison({4}, what="gradient")]).fit()
    average = theirs._average_model
    assert not all(p.isfinite().all() for p in average.module.parameters())
    assert average.use_buffers and int(average.n_averaged) > 3


def test_the_form_matched_to_scale_remembers_its_share_of_the_run():
    matched = EmaConfig(decay=None, horizon_frac=1 / 11)
    assert matched.decay_for(11_000) == pytest.approx(0.999)
    assert matched.decay_for(440) == pytest.approx(0.975)
    for both in ({"decay": 0.9, "horizon_frac": 0.1}, {"decay": None, "horizon_frac": None}):
        with pytest.raises(ValueError, match="exactly one of decay"):
            EmaConfig(**both)


def test_the_ramp_of_the_library_is_what_the_option_file_says():
    """In 440 updates the literal decay never acts, and the matched one hardly less."""
    average = torch_ema.ExponentialMovingAverage([torch.zeros(1)], decay=0.999)

    def decay(num_updates: int) -> float:
        weight = torch.nn.Parameter(torch.ones(1))
        average.num_updates = num_updates - 1
        average.shadow_params[0].zero_()
        average.update([weight])
        return 1 - average.shadow_params[0].item()

    first = next(n for n in range(8_900, 9_100) if decay(n) >= 0.999 - 1e-7)
    comment = (ROOT / "conf" / "stability" / "ema.yaml").read_text()
    assert f"{decay(440):.3f} at 440" in comment
    assert f"update {first:,}." in comment
    matched = EmaConfig(decay=None, horizon_frac=1 / 11).decay_for(440)
    assert 0 < decay(440) - matched < 0.006


def test_averaged_weights_are_in_place_inside_the_context_only():
    callback = average()
    run = Harness(callbacks=[callback]).fit()
    raw = [p.detach().clone() for p in run.task.parameters()]
    with callback.averaged():
        inside = [p.detach().clone() for p in run.task.parameters()]
    assert_same_tree(inside, list(callback.average.shadow_params))
    assert_same_tree([p.detach() for p in run.task.parameters()], raw)


def test_the_shadow_is_in_the_checkpoint_in_float32(tiny):
    folder = train(tiny, "stability=ema", "recipe.precision=bf16-mixed")
    states = last_checkpoint(folder)["callbacks"]
    (state,) = [s for name, s in states.items() if "WeightAverage" in name]
    assert {shadow.dtype for shadow in state["shadow_params"]} == {torch.float32}
    assert state["num_updates"] == 12


def test_parameters_too_coarse_to_average_are_refused():
    run = Harness(callbacks=[average()])
    run.task.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="ema needs float32 parameters"):
        run.fit()
