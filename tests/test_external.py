"""Models that are not ours, in all that the project does with models."""

import json
from pathlib import Path

import pytest
import torch

from src import describe, generate, replay
from src.config import compose
from src.contract import check_contract
from src.examples.llama import build as build_llama
from src.examples.mixtral import build as build_mixtral
from src.examples.mlp import MLPLanguageModel
from src.stability import REMEDIES
from src.streams import generator
from src.train import main
from src.watch import expose_router
from tests.builders import DIMS, moe_config
from tests.conftest import PACE
from tests.runs import assert_same_run, metrics, record, stop_after, train

MLP = ["model=external", "model.target=src.examples.mlp:MLPLanguageModel"]
LLAMA = ["model=external", "model.target=src.examples.llama:build"]

OWN = """
import functools

import torch
from torch import nn

from own_decorator import timed


class Bigram(nn.Module):
    def __init__(self, vocab_size, shift=0, rows=None):
        super().__init__()
        self.table = nn.Embedding(rows or vocab_size, rows or vocab_size)
        self.shift = shift

    def forward(self, tokens):
        logits = self.table(tokens)
        return logits.roll(-self.shift, dims=1)


def raises(vocab_size):
    raise RuntimeError("no such thing\\nand more")


def number():
    return 3


class Pair(Bigram):
    def forward(self, tokens):
        return self.table(tokens), None


class Flat(Bigram):
    def forward(self, tokens):
        return self.table(tokens).flatten(0, 1)


def leaves(vocab_size):
    raise SystemExit


class LeavesLate(Bigram):
    def forward(self, tokens):
        raise SystemExit("no more")


class Whole(Bigram):
    def forward(self, tokens):
        return self.table(tokens).long()


class Detached(Bigram):
    def forward(self, tokens):
        return self.table(tokens).detach()


class OnlyInEvaluation(Bigram):
    def forward(self, tokens):
        if self.training:
            raise ValueError("not in training")
        return self.table(tokens)


def frozen(vocab_size):
    return Bigram(vocab_size).requires_grad_(False)


def double(vocab_size):
    return Bigram(vocab_size).double()


class Method(Bigram):
    # Gives what it is told to by one of the methods that a model may have.
    def __init__(self, vocab_size, method, gives):
        super().__init__(vocab_size)
        values = {
            "list": [1],
            "vector": {"balance": torch.ones(2)},
            "float": {"balance": 1.0},
            "ours": {"loss": torch.ones(())},
            "slash": {"a/b": torch.ones(())},
            "tensor": {"load": torch.ones(())},
            "fraction": 0.5,
            "all": sum(p.numel() for p in self.parameters()),
            "uneven": {"load": float("nan"), "count": 3},
        }
        setattr(self, method, lambda: values[gives])


class Finish(Bigram):
    def finish_step(self):
        pass


class FinishBatch(Bigram):
    def finish_batch(self, more):
        pass


class FinishRaises(Bigram):
    def finish_step(self, applied):
        raise OSError("disk full")


class OneRow(Bigram):
    def forward(self, tokens):
        assert len(tokens) == 1
        return self.table(tokens)


class Late(Bigram):
    # Makes a parameter when it runs first.
    def forward(self, tokens):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(1))
        return self.table(tokens) * self.scale


class Counts(Bigram):
    # The scale hangs on a step that no checkpoint knows.
    steps = 0

    def finish_step(self, applied):
        self.steps += 1


class NotANumber(Bigram):
    def forward(self, tokens):
        return self.table(tokens) * float("nan")


def meta(vocab_size):
    with torch.device("meta"):
        return Bigram(vocab_size)


class Chatty(Bigram):
    def forward(self, tokens):
        print("here I am")
        return super().forward(tokens)


class Factory:
    def __call__(self, vocab_size):
        return Bigram(vocab_size)


factory = Factory()
part = functools.partial(Bigram, shift=0)


@timed
def wrapped(vocab_size):
    return Bigram(vocab_size)
"""

DECORATOR = """
import functools


def timed(build):
    @functools.wraps(build)
    def inner(*args, **kwargs):
        return build(*args, **kwargs)

    return inner
"""


@pytest.fixture
def pace(tmp_path, monkeypatch, shared_cache):
    """Arguments of a tiny run in a folder with a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_model.py").write_text(OWN)
    (tmp_path / "own_decorator.py").write_text(DECORATOR)
    (tmp_path / "own_leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.delitem(__import__("sys").modules, "own_model", raising=False)
    return [*PACE, f"paths.cache={shared_cache}"]


def own(name: str) -> list[str]:
    return ["model=external", f"model.target=own_model:{name}"]


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


def test_what_it_draws_comes_from_the_seed(pace):
    runs = [
        train(pace, *MLP, f"seed={seed}", f"study={study}")
        for seed, study in ((1, "a"), (1, "b"), (2, "a"))
    ]
    one, again, other = (metrics(folder) for folder in runs)
    assert one == again
    assert one[0]["train/loss"] != other[0]["train/loss"]


def test_what_it_draws_hangs_on_nothing_that_was_drawn_before(pace):
    config = compose("train", [*pace, *MLP])
    weights = []
    for draws in range(2):
        torch.rand(draws)
        model = config.architecture.build(
            vocab_size=20, generator_for=lambda name: generator(3, "init", name)
        )
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_interrupted_and_resumed_is_uninterrupted(pace, monkeypatch):
    arguments = [*pace, *MLP, "stability=[ema,noise]"]
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


def test_a_model_that_sees_the_future_is_noted(pace):
    folder = train(pace, *own("Bigram"), "model.kwargs={shift:1}")
    (note,) = record(folder)["notes"]
    assert "changes the logits before it" in note


BAD = {
    "model=external": ["model.target", "no value yet"],
    "model=external model.target=own_model": ["model.target=own_model", "package.module:callable"],
    "model=external model.target=no_such:build": ["no_such:build", "No module named 'no_such'"],
    "model=external model.target=own_model:missing": ["own_model:missing", "has no attribute"],
    "model=external model.target=own_model:OWN": ["own_model:OWN"],
    "model=external model.target=own_model:raises": ["RuntimeError: no such thing"],
    "model=external model.target=own_model:number": ["gives a int", "nn.Module"],
    "model=external model.target=own_model:Pair": ["give tuple", "(batch, time, vocabulary)"],
    "model=external model.target=own_model:Flat": [
        "(2, 16) give (32, ",
        "(batch, time, vocabulary)",
    ],
    "model=external model.target=own_model:Bigram model.kwargs={rows:5}": ["own_model:Bigram"],
    "model=external model.target=own_model:Bigram model.kwargs={depth:5}": ["'depth'"],
    "model=external model.target=own_model:leaves": ["own_model:leaves: SystemExit"],
    "model=external model.target=own_leaves:build": ["own_leaves:build: SystemExit: 0"],
    "model=external model.target=own_model:LeavesLate": ["SystemExit: no more"],
    "model=external model.target=own_model:Whole": ["torch.int64", "floating point"],
    "model=external model.target=own_model:Detached": ["hang on no parameter"],
    "model=external model.target=own_model:OnlyInEvaluation": ["ValueError: not in training"],
    "model=external model.target=own_model:frozen": ["without a parameter to be trained"],
    "model=external model.target=own_model:double": ["table.weight is torch.float64", "float32"],
    "model=external model.target=own_model:Finish": ["finish_step", "'applied'"],
    "model=external model.target=own_model:FinishBatch": ["finish_batch", "'more'"],
    "model=external model.target=own_model:FinishRaises": ["finish_step: OSError: disk full"],
    "model=external model.target=own_model:OneRow": ["of shape (2, 16): AssertionError"],
    "model=external model.target=own_model:meta": ["table.weight is on meta", "on the CPU"],
    "model=external model.target=math:hypot": ["math:hypot"],
    "model=external model.target=own_model:Bigram attention=gqa": ["attention=gqa", "its own"],
    "model=external model.target=own_model:Bigram ffn=moe": ["ffn=moe", "its own"],
    "model=external model.target=own_model:Bigram init=x": ["model=external", "init=x"],
    "model=external model.target=own_model:Bigram model.num_layers=2": [
        "model.num_layers: unknown field",
        "allowed: model.target, model.kwargs\n",
    ],
    "model=external model.target=own_model:Bigram model.kwargs=3": ["model.kwargs=3"],
    "model=external model.target=own_model:Bigram model.kwargs=[1]": ["must be {name: value}"],
    "model=external model.target=[a]": ["model.target=[a]: must be text"],
    "model=external model.target=own_model:Bigram preset=crash": [
        "preset=crash",
        "model.router_init_std, which model=external has not",
    ],
    "model=proxy model.kwargs.rows=3": ["model.kwargs.rows", "unknown field"],
    "attention=external": ["attention=external", "model=external alone"],
}


def test_state_that_no_checkpoint_holds_is_noted(pace, capsys):
    folder = train(pace, *own("Counts"))
    (note,) = record(folder)["notes"]
    assert "steps changes in training and is no buffer" in note
    assert note in capsys.readouterr().err


def test_logits_that_are_not_finite_say_nothing_about_the_future(pace):
    folder = train(pace, *own("NotANumber"))
    assert record(folder)["notes"] == []
    assert record(folder)["outcome"] == "collapsed"


def test_a_parameter_that_is_made_late_is_trained(pace):
    folder = train(pace, *own("Late"))
    assert record(folder)["outcome"] == "clean"
    assert record(folder)["params_total"] == record(folder)["vocab_size"] ** 2 + 1


FAULTY = [
    "model=external",
    "model.target=src.detection.faults:build",
    "model.kwargs={fault:gradient_growth,steps:40}",
    "recipe.max_steps=40",
]


def test_a_model_with_a_memory_of_its_own_fails_alike_whether_its_beginning_is_shared(pace):
    sweep = [*pace, "--multirun", *FAULTY, "stability=warmdown"]
    first = {}
    for shared in ("true", "false"):
        assert main([*sweep, f"share_prefix={shared}", f"study=shared_{shared}"]) == 0
        for file in Path("runs", f"shared_{shared}").rglob("record.json"):
            made = json.loads(file.read_text())
            first[shared, made["variant"]["stability"]] = made["guard"]["first_nonfinite_step"]
    assert first["true", "warmdown"] == first["false", "warmdown"] is not None


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_language_model_is_refused_in_one_line(case, pace, capsys):
    assert main([*pace, *case.split(" ")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in BAD[case]:
        assert part in error
    assert not Path("runs").exists()


METHODS = {
    ("extra_losses", "list"): "gives a list, must be losses by name",
    ("extra_losses", "vector"): "balance as a tensor (2,) of torch.float32",
    ("extra_losses", "float"): "balance as a float, must be a tensor of one number",
    ("extra_losses", "ours"): "gives loss, which is a term of the training's own",
    ("extra_losses", "slash"): "'a/b', must be named by letters",
    ("router_stats", "list"): "router_stats of the model: gives a list, must be figures by name",
    ("router_stats", "tensor"): "load as a tensor () of torch.float32, must be a float",
    ("num_inactive_params", "fraction"): "num_inactive_params gives 0.5",
    ("num_inactive_params", "all"): "must be an integer from 0 to below",
}


@pytest.mark.parametrize(("method", "gives"), METHODS)
def test_a_method_that_gives_something_else_is_refused_in_one_line(method, gives, pace, capsys):
    kwargs = f"model.kwargs={{method:{method},gives:{gives}}}"
    assert main([*pace, *own("Method"), kwargs]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert METHODS[method, gives] in error
    assert not Path("runs").exists()


def test_figures_of_a_router_may_be_integers_and_not_finite(pace):
    folder = train(pace, *own("Method"), "model.kwargs={method:router_stats,gives:uneven}")
    last = metrics(folder)[-1]
    assert last["moe/layer_0/count"] == 3
    assert record(folder)["outcome"] == "clean"


@pytest.mark.parametrize("name", ["factory", "part", "wrapped"])
def test_an_object_that_can_be_called_is_a_target_and_its_file_part_of_the_hash(
    name, pace, tmp_path
):
    assert record(train(pace, *own(name)))["outcome"] == "clean"
    before = compose("train", [*pace, *own(name)]).config_hash()
    (tmp_path / "own_model.py").write_text(OWN + "\n# changed\n")
    assert compose("train", [*pace, *own(name)]).config_hash() != before


def test_what_it_prints_is_no_part_of_an_answer(pace, capsys):
    assert describe.main([*pace, *own("Chatty"), "format=json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["params_total"]
    assert "here I am" in said.err


class Restless(torch.nn.Module):
    """Draws, and changes itself, in every forward pass in training."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
        self.norm, self.drop = torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        self.passes = 0

    def forward(self, tokens):
        self.passes += 1
        x = self.norm(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.drop(x))


def test_a_run_of_it_is_no_beginning_for_another(pace, capsys):
    folder = train(pace, *own("Bigram"))
    assert main([*pace, f"init={folder}"]) == 2
    assert "has an external model, which its target alone can build" in capsys.readouterr().err


def test_being_tried_leaves_a_model_as_it_was():
    torch.manual_seed(0)
    model = Restless().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    check_contract(model, torch.zeros(1, 8, dtype=torch.long), what="it")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.passes == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


REFUSED = {"qk_norm", "latent_norm", "router_eps", "router_freeze", "router_z_loss"}


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
    assert "With src.examples.mlp:MLPLanguageModel at preset" in page


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
    assert incident["cause"] == "guard failure"
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
