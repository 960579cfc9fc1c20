import pytest
from torch import nn

from nonfinite.lightning import ActivationWatch, GradientWatch, RouterWatch, SpikeWatch
from tests.runs import assert_same_tree, metrics, record, train
from tests.training.harness import Harness, recipe_config

FIGURES = {
    "max_violation",
    "load_min",
    "load_expected",
    "load_max",
    "bias_mean",
    "bias_absmax",
    "topk_sum_min",
    "picked_logit_min",
    "load_entropy",
    "dead_experts",
    "tiny_sum_frac",
    "saturated_frac",
    "bias_drift",
}


def test_every_router_is_logged_by_layer(tiny):
    folder = train(tiny, "model.num_layers=2")
    for line in metrics(folder):
        for layer in (0, 1):
            names = {n.rpartition("/")[2] for n in line if n.startswith(f"moe/layer_{layer}/")}
            assert names == FIGURES
        assert line["moe/layer_0/load_expected"] == pytest.approx(2 / 7)
        assert line["moe/layer_0/load_min"] <= 2 / 7 <= line["moe/layer_0/load_max"]
        # The loads have a mean of top_k / E by construction.
        largest = (line["moe/layer_0/max_violation"] + 1) * 2 / 7
        assert abs(line["moe/layer_0/load_max"] - largest) < 1e-6


def test_a_dense_model_has_no_router_figures(tiny):
    arguments = [a for a in tiny if not a.startswith("ffn.")]
    folder = train(arguments, "ffn=mlp")
    assert not any(name.startswith("moe/") for line in metrics(folder) for name in line)


def test_any_module_with_the_method_is_read():
    class Foreign(nn.Module):
        def router_stats(self) -> dict[str, float]:
            return {"max_violation": 0.25}

    run = Harness(recipe=recipe_config(max_steps=1))
    run.task.foreign = Foreign()
    run.callbacks = [RouterWatch(every=1)]
    run.fit()
    assert 0.25 in [v for k, v in run.recorder.lines[1].items() if k.endswith("max_violation")]


def test_instruments_change_nothing():
    blind = Harness().fit()
    watched = Harness()
    watched.callbacks = [
        RouterWatch(every=1),
        GradientWatch(every=1),
        ActivationWatch(every=1),
        SpikeWatch(watched.step_guard, every=1),
    ]
    assert_same_tree(watched.fit().states, blind.states)


def test_a_gate_on_its_way_to_underflow_is_announced_once_before_it_fails(tiny, capsys):
    gate = ("ffn=moe_writeup_add", "model.sizes.writeup_bias_rate=12.0")
    pace = ("recipe.max_steps=60", "recipe.log_every=2", "recipe.precision=32-true")
    folder = train(tiny, *gate, *pace)
    lines = [line for line in capsys.readouterr().err.splitlines() if "lowest picked" in line]
    assert len(lines) == 1
    step = int(lines[0].split("step ")[1].split(":")[0])
    failed = record(folder)["incident"]["step"]
    assert failed / 6 < failed - step < failed * 3 / 4
