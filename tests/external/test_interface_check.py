"""What a model that is not ours must be able to do, and what is said where it is not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from src import describe
from src.config.compose import compose
from src.external.interface_check import check_interface
from src.train import main
from tests.external.own import OWN, own
from tests.runs import metrics, record, train


def test_a_model_that_sees_the_future_is_noted(pace):
    folder = train(pace, *own("Bigram"), "model.kwargs={shift:1}")
    (note,) = record(folder)["notes"]
    assert "model is not causal" in note


def test_state_that_no_checkpoint_holds_is_noted(pace, capsys):
    folder = train(pace, *own("Counts"))
    (note,) = record(folder)["notes"]
    assert "steps changes in training but is not a persistent buffer" in note
    assert note in capsys.readouterr().err


def test_every_memory_that_no_checkpoint_holds_is_noted_and_nothing_else(pace):
    notes = record(train(pace, *own("Remembers")))["notes"]
    names = [note.partition(": ")[2].partition(" changes in training")[0] for note in notes]
    assert sorted(names) == ["by_name", "mean", "seen", "tensor"]


def test_logits_that_are_not_finite_say_nothing_about_the_future(pace):
    folder = train(pace, *own("NotANumber"))
    assert record(folder)["notes"] == []
    assert record(folder)["outcome"] == "collapsed"


def test_a_parameter_that_is_made_late_is_trained(pace):
    folder = train(pace, *own("Late"))
    assert record(folder)["outcome"] == "clean"
    assert record(folder)["params_total"] == record(folder)["vocab_size"] ** 2 + 1


BAD = {
    "model=external": ["model.target", "has no value"],
    "model=external model.target=own_model": ["model.target=own_model", "package.module:callable"],
    "model=external model.target=no_such:build": ["no_such:build", "No module named 'no_such'"],
    "model=external model.target=own_model:missing": ["own_model:missing", "has no attribute"],
    "model=external model.target=own_model:OWN": ["own_model:OWN"],
    "model=external model.target=own_model:raises": ["RuntimeError: no such thing"],
    "model=external model.target=own_model:number": ["returned a int", "nn.Module"],
    "model=external model.target=own_model:Pair": ["gave tuple", "(batch, time, vocabulary)"],
    "model=external model.target=own_model:Flat": [
        "(2, 16) gave (32, ",
        "(batch, time, vocabulary)",
    ],
    "model=external model.target=own_model:Bigram model.kwargs={rows:5}": ["own_model:Bigram"],
    "model=external model.target=own_model:Bigram model.kwargs={depth:5}": ["'depth'"],
    "model=external model.target=own_model:leaves": ["own_model:leaves: SystemExit"],
    "model=external model.target=own_leaves:build": ["own_leaves:build: SystemExit: 0"],
    "model=external model.target=own_model:LeavesLate": ["SystemExit: no more"],
    "model=external model.target=own_model:Whole": ["torch.int64", "floating point"],
    "model=external model.target=own_model:Detached": ["do not depend on any trainable parameter"],
    "model=external model.target=own_model:OnlyInEvaluation": ["ValueError: not in training"],
    "model=external model.target=own_model:frozen": ["without trainable parameters"],
    "model=external model.target=own_model:double": ["table.weight is torch.float64", "float32"],
    "model=external model.target=own_model:Finish": ["finish_step", "'applied'"],
    "model=external model.target=own_model:FinishBatch": ["finish_batch", "'more'"],
    "model=external model.target=own_model:FinishRaises": ["finish_step: OSError: disk full"],
    "model=external model.target=own_model:OneRow": ["of shape (2, 16): AssertionError"],
    "model=external model.target=own_model:meta": ["table.weight is on meta", "on the CPU"],
    "model=external model.target=own_model:Expanded": ["entries of places share memory"],
    "model=external model.target=own_model:Sparse": ["gradient of table.weight is sparse"],
    "model=external model.target=own_model:scripted": ["the model is a torch.jit module"],
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
        "model.router_init_std, which model=external lacks",
    ],
    "model=proxy model.kwargs.rows=3": ["model.kwargs.rows", "is a field of model=external"],
    "attention=external": ["attention=external", "needs model=external"],
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_language_model_is_refused_in_one_line(case, pace, capsys):
    assert main([*pace, *case.split(" ")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in BAD[case]:
        assert part in error
    assert not Path("runs").exists()


METHODS = {
    ("extra_losses", "list"): "returned a list; must be a dict of losses by name",
    ("extra_losses", "vector"): "balance as a tensor (2,) of torch.float32",
    ("extra_losses", "float"): "balance as a float; must be a floating-point scalar",
    ("extra_losses", "ours"): "returned loss, which is a built-in loss",
    ("extra_losses", "slash"): "'a/b'; names may hold only letters",
    (
        "router_stats",
        "list",
    ): "router_stats of the model: returned a list; must be a dict of floats by name",
    ("router_stats", "tensor"): "load as a tensor () of torch.float32; must be a float",
    ("num_inactive_params", "fraction"): "num_inactive_params returned 0.5",
    ("num_inactive_params", "all"): "must be an integer below",
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
        x = x + random.random() + np.random.rand()
        return self.head(self.drop(x))


def test_being_tried_leaves_a_model_as_it_was():
    torch.manual_seed(0)
    model = Restless().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    np.random.seed(0)
    host = random.getstate(), np.random.rand()
    np.random.seed(0)
    check_interface(model, torch.zeros(1, 8, dtype=torch.long), what="it")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (random.getstate(), np.random.rand()) == host
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.passes == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_fails_in_the_precision_of_the_run_is_refused_before_it_starts(pace, capsys):
    in_bf16 = [*pace, *own("OnlyInFloat32"), "recipe.precision=bf16-mixed"]
    assert main(in_bf16) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: recipe.precision=bf16-mixed: model.target=own_model:OnlyInFloat"
    )
    assert "in mixed precision: RuntimeError" in error
    assert main([*pace, *own("OnlyInFloat32"), "recipe.precision=32-true"]) == 0


def test_of_an_output_that_has_logits_these_are_taken(pace):
    folder = train(pace, *own("HasLogits"))
    plain = train(pace, *own("Bigram"))
    assert record(folder)["final"]["val/loss"] == record(plain)["final"]["val/loss"]
