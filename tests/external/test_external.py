"""Models that are not ours, in all that the project does with models."""

import json
from pathlib import Path

import pytest
import torch

from nonfinite import expose_router
from src import describe, generate, replay
from src.common.random_streams import generator
from src.config.compose import compose
from src.examples.llama import build as build_llama
from src.examples.mixtral import build as build_mixtral
from src.examples.mlp import MLPLanguageModel
from src.stability import REMEDIES
from src.train import main
from tests.builders import DIMS, moe_config
from tests.external.own import OWN, own
from tests.runs import assert_same_run, metrics, record, stop_after, train

MLP = ["model=external", "model.target=src.examples.mlp:MLPLanguageModel"]
LLAMA = ["model=external", "model.target=src.examples.llama:build"]


def test_a_model_of_the_users_own_trains_and_is_recorded(pace):
    folder = train(pace, *own("Bigram"), "recipe.learning_rate=0.1", "stability=ema")
    made, lines = record(folder), metrics(folder)
    assert made["outcome"] == "clean"
    assert made["params_total"] == made["params_active"] == made["vocab_size"] ** 2
    assert made["variant"]["model"] == "external"
    assert made["cache_bytes_per_token"] is None
    assert made["notes"] == []
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert "val_ema/loss" in lines[-1]


def test_kwargs_reach_the_callable_and_make_another_run(pace):
    few = train(pace, *MLP, "model.kwargs={inner_dim:16,context:4}")
    more = train(pace, *MLP, "model.kwargs={inner_dim:32,context:4}")
    assert few != more
    assert record(few)["params_total"] < record(more)["params_total"]


@pytest.mark.parametrize("model", [MLP, own("Draws")], ids=["mlp", "draws"])
def test_what_it_draws_comes_from_the_seed(model, pace):
    runs = [
        train(pace, *model, f"seed={seed}", f"study={study}")
        for seed, study in ((1, "a"), (1, "b"), (2, "a"))
    ]
    one, again, other = (metrics(folder) for folder in runs)
    assert one == again
    assert one[0]["train/loss"] != other[0]["train/loss"]


@pytest.mark.parametrize("model", [MLP, own("Draws")], ids=["mlp", "draws"])
def test_what_it_draws_hangs_on_nothing_that_was_drawn_before(model, pace):
    config = compose("train", [*pace, *model])
    weights = []
    for draws in range(2):
        torch.rand(draws)
        model = config.architecture.build(
            vocab_size=20, generator_for=lambda name: generator(3, "init", name)
        )
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("model", [MLP, own("Draws"), own("Grows")], ids=["mlp", "draws", "grows"])
def test_interrupted_and_resumed_is_uninterrupted(model, pace, monkeypatch):
    arguments = [*pace, *model, "stability=[ema,noise]"]
    whole = train(arguments, "study=whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main([*arguments, "study=parts"]) == 143
    assert main([*arguments, "study=parts"]) == 0
    assert_same_run(whole, Path(str(whole).replace("whole", "parts")))


def test_a_changed_file_is_another_run(pace, tmp_path):
    before = compose("train", [*pace, *own("Bigram")]).config_hash()
    (tmp_path / "own_model.py").write_text(OWN + "\n# changed\n")
    assert compose("train", [*pace, *own("Bigram")]).config_hash() != before


def test_a_mask_that_grows_hides_the_future_after_it_was_tried(pace):
    """A pass over shorter rows leaves no mask for longer ones behind."""
    config = compose("train", [*pace, *own("Grows")])
    model = config.architecture.build(
        vocab_size=20, generator_for=lambda name: generator(0, "init", name)
    )
    assert (model.mask.shape, model.scratch.shape, model.cache.shape) == ((1, 1), (0,), (1,))
    assert torch.equal(model.places, torch.arange(8).expand(4, -1))
    assert config.architecture.notes(model) == []
    assert record(train(pace, *own("Grows")))["outcome"] == "clean"


def test_infinities_of_a_frozen_parameter_are_a_mask(pace):
    made = record(train(pace, *own("Masked")))
    assert (made["outcome"], made["incident"]) == ("clean", None)


def test_an_operation_of_a_compiled_model_is_named(pace):
    made = record(train(pace, *own("compiled")))
    assert made["guard"]["first_nonfinite_step"] == made["incident"]["step"] == 3
    assert made["incident"]["module"] == "model._orig_mod"
    assert "torch.Tensor.div (forward) produced" in made["incident"]["line"]


FAULTY = [
    "model=external",
    "model.target=src.lab.detector.faults:build",
    "model.kwargs={fault:gradient_growth,steps:40}",
    "recipe.max_steps=40",
]


@pytest.mark.slow
def test_a_model_with_a_memory_of_its_own_fails_alike_whether_its_beginning_is_shared(pace):
    sweep = [*pace, "--multirun", *FAULTY, "stability=warmdown"]
    first = {}
    for shared in ("true", "false"):
        assert main([*sweep, f"share_prefix={shared}", f"study=shared_{shared}"]) == 0
        for file in Path("runs", f"shared_{shared}").rglob("record.json"):
            made = json.loads(file.read_text())
            first[shared, made["variant"]["stability"]] = made["guard"]["first_nonfinite_step"]
    assert first["true", "warmdown"] == first["false", "warmdown"] is not None


def test_a_run_of_it_is_no_beginning_for_another(pace, capsys):
    folder = train(pace, *own("Bigram"))
    assert main([*pace, f"init={folder}"]) == 2
    assert "has an external model, which only its model.target can build" in capsys.readouterr().err


REFUSED = {
    *("qk_norm", "qk_clip", "latent_norm", "gated_attention", "swiglu_clamp"),
    *("softcap_attention", "softcap_head", "softcap_router"),
    *("router_center", "router_eps", "router_eps20", "router_freeze", "router_smebu"),
    "router_z_loss",
}


@pytest.mark.parametrize("option", REMEDIES)
def test_every_option_acts_or_is_refused_by_name(option, pace, capsys):
    if option in REFUSED:
        assert main([*pace, *MLP, f"stability={option}"]) == 2
        assert f"stability={option}: needs " in capsys.readouterr().err
        return
    folder = train(pace, *MLP, f"stability={option}")
    assert record(folder)["outcome"] == "clean"
    assert option in record(folder)["variant_name"]


def test_presets_keep_their_recipe_and_leave_the_parts_to_the_model():
    config = compose("train", ["preset=stress", *MLP])
    assert config.recipe.max_steps == 440
    assert config.variant.model == config.variant.ffn == "external"


def test_a_sweep_takes_them_like_any_other_model(pace):
    assert main([*pace, "--multirun", *MLP, "stability=clip03", "seed=0,1", "study=ours"]) == 0
    outcomes = [record(file.parent) for file in Path("runs/ours").rglob("record.json")]
    assert len(outcomes) == 4
    page = Path("runs/ours/report/report.html").read_text()
    assert "clip03" in page
    assert "stay finite with src.examples.mlp:MLPLanguageModel at preset" in page


def test_describe_counts_what_it_runs(pace, capsys):
    kwargs = "model.kwargs={hidden_dim:8,context:2,inner_dim:16}"
    assert describe.main([*pace, *MLP, kwargs, "format=json"]) == 0
    size = json.loads(capsys.readouterr().out)
    vocab = size["vocab_size"]
    assert size["params_total"] == vocab * 8 + (16 * 16 + 16) + (16 * vocab + vocab)
    # Two a weight of each product, forward; three times as much with the backward pass.
    assert size["forward_flops_per_token"] == 2 * (16 * 16 + 16 * vocab)
    assert size["flops_per_token"] == 3 * size["forward_flops_per_token"]
    assert size["cache_bytes_per_token"] is None
    assert describe.main([*pace, *MLP]) == 0
    assert "unknown" in capsys.readouterr().out


def test_attention_is_counted_too(pace, capsys):
    assert describe.main([*pace, *LLAMA, "model.kwargs={num_layers:1}", "format=json"]) == 0
    size = json.loads(capsys.readouterr().out)
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192 + 64 * size["vocab_size"]
    # Scores and the weighted sum, each over all 16 positions: the kernel that is counted masks.
    assert size["forward_flops_per_token"] == pytest.approx(2 * weights + 4 * 64 * 16, rel=0.01)


def test_generation_reads_models_of_ours_only(pace, capsys):
    folder = train(pace, *MLP)
    capsys.readouterr()
    assert not (folder / "samples.md").exists()
    assert generate.main([f"run={folder}"]) == 2
    assert "external" in capsys.readouterr().err


def poison(name: str, monkeypatch) -> None:
    """The llama's weight of this name is NaN in one entry from the start."""

    def build(*, vocab_size, max_seq_len):
        model = build_llama(vocab_size=vocab_size, max_seq_len=max_seq_len)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = float("nan")
        return model

    monkeypatch.setattr("src.examples.llama.build", build)


def test_a_nan_planted_in_a_llama_of_transformers_is_found(pace, monkeypatch, capsys):
    name = "model.model.layers.2.mlp.down_proj.weight"
    poison(name, monkeypatch)
    folder = train(pace, *LLAMA)
    incident = record(folder)["incident"]
    assert incident["step"] == 1
    assert incident["module"] == f"model.{name.removesuffix('.weight')}"
    assert incident["cause"] == "non-finite weights"
    assert record(folder)["outcome"] == "collapsed"
    capsys.readouterr()
    place = folder / "incidents" / "step-1"
    assert replay.main([f"incident={place}"]) == 2
    again = f"src.diagnose checkpoint={place} target=src.examples.llama:build"
    assert f"its model is external; {again} runs it again" in capsys.readouterr().err
    assert again in (place / "incident.html").read_text()


def test_an_operation_of_a_llama_is_named(pace, monkeypatch):
    """Queries and keys whose products overflow, though each of them is finite."""

    def build(*, vocab_size, max_seq_len):
        model = build_llama(vocab_size=vocab_size, max_seq_len=max_seq_len)
        with torch.no_grad():
            for proj in ("q_proj", "k_proj"):
                model.get_parameter(f"model.model.layers.1.self_attn.{proj}.weight").mul_(1e22)
        return model

    monkeypatch.setattr("src.examples.llama.build", build)
    incident = record(train(pace, *LLAMA, "recipe.precision=32-true"))["incident"]
    assert incident["module"] == "model.model.model.layers.1.self_attn"
    assert incident["cause"] == "exploding weights"


def test_the_router_instruments_read_a_mixtral(pace):
    folder = train(pace, "model=external", "model.target=src.examples.mixtral:build")
    last = metrics(folder)[-1]
    layers = {name.split("/")[1] for name in last if name.startswith("moe/")}
    assert layers == {f"layer_{i}" for i in range(4)}
    assert last["moe/layer_0/load_max"] >= 0.5 >= last["moe/layer_0/load_min"]
    assert last["train/router_balance"] > 0
    made = record(folder)
    assert made["params_active"] < made["params_total"]


def test_the_mixtrals_inactive_parameters_are_those_of_the_experts_not_picked():
    model = build_mixtral(vocab_size=16, max_seq_len=8, num_experts=4, top_k=1, num_layers=2)
    assert model.num_inactive_params() == 2 * 3 * (3 * 64 * 96)


def test_an_exposed_gate_has_the_figures_of_a_router_of_ours():
    torch.manual_seed(0)
    router = moe_config(num_routed=5, top_k=2).build(DIMS).router
    torch.nn.init.normal_(router.weight, std=2.0)
    router.train()
    x_SD = torch.randn(64, DIMS.hidden_dim)
    router(x_SD)
    router.finish_step(applied=False)
    ours = router.router_stats()

    gate = torch.nn.Linear(DIMS.hidden_dim, 5, bias=False)
    gate.load_state_dict({"weight": router.weight.detach()})
    expose_router(gate, num_experts=5, read=lambda out: (out, out.topk(2).indices), sigmoid=True)
    assert gate.router_stats() == {}
    gate.train()
    gate(x_SD)
    theirs = gate.router_stats()
    gate.eval()
    gate(torch.zeros(3, DIMS.hidden_dim))
    assert gate.router_stats() == theirs
    shared = set(ours) & set(theirs)
    assert {"max_violation", "load_min", "load_max", "topk_sum_min", "picked_logit_min"} <= shared
    for name in shared:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name


def test_the_examples_are_causal_and_take_a_batch_row_by_row():
    torch.manual_seed(0)
    tokens = torch.randint(16, (2, 8))
    for model in (
        MLPLanguageModel(vocab_size=16),
        build_llama(vocab_size=16, max_seq_len=8),
        build_mixtral(vocab_size=16, max_seq_len=8),
    ):
        model.eval()
        both = model(tokens)
        assert both.shape == (2, 8, 16)
        # Products over two rows are summed in another order.
        torch.testing.assert_close(both[:1], model(tokens[:1]), atol=1e-5, rtol=1e-4)
        changed = tokens.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 16
        torch.testing.assert_close(model(changed)[:, :5], both[:, :5], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(changed)[:, 5], both[:, 5])
