"""The post-mortem of a saved state: ours, and somebody else's."""

import argparse
import json
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nonfinite.headroom import Headroom
from src import diagnose
from src.examples.llama import build as build_llama
from src.examples.mlp import MLPLanguageModel
from tests.conftest import PACE
from tests.runs import record, train

LLAMA = "target=src.examples.llama:build"
KWARGS = "kwargs={vocab_size:20,max_seq_len:16,num_layers:2}"


def answer(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert diagnose.main([*arguments, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A small Llama, and a batch beside it in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(20, size=(2, 9))
    np.save("batch.npy", ids)
    return build_llama(vocab_size=20, max_seq_len=16, num_layers=2)


def plant(model, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value


DOWN = "model.model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("form", ["plain.pt", "lightning.ckpt", "plain.safetensors"])
def test_a_nan_in_the_weights_of_somebody_elses_model_is_found(form, llama, capsys):
    plant(llama, DOWN, math.nan)
    weights = llama.state_dict()
    if form == "plain.pt":
        torch.save(weights, form)
    elif form == "lightning.ckpt":
        # Beside a weight of the task's own, and under the task's own name for the model.
        named = {f"net.{name}": value for name, value in weights.items()}
        torch.save({"state_dict": {**named, "loss.weight": torch.ones(3)}, "epoch": 1}, form)
    else:
        # Tied weights are one tensor under two names, which the format does not take.
        save_file({name: value.clone() for name, value in weights.items()}, form)
    found = answer(capsys, f"checkpoint={form}", "batch=batch.npy", LLAMA, KWARGS)
    assert found["finding"]["module"] == DOWN.removesuffix(".weight")
    assert found["finding"]["phase"] == "weights"
    assert found["cause"] == "non-finite weights"


def test_an_operation_is_named_where_the_weights_are_finite(llama, capsys):
    for name in ("q_proj", "k_proj"):
        llama.get_parameter(f"model.model.layers.0.self_attn.{name}.weight").data.fill_(1e20)
    torch.save(llama.state_dict(), "w.pt")
    found = answer(capsys, "checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS)
    assert found["finding"]["module"] == "model.model.layers.0.self_attn"
    assert found["cause"] == "exploding weights"
    assert diagnose.main(["checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("model.model.layers.0.self_attn: ") and "cause: exploding weights" in said
    )


def test_where_all_is_finite_the_nearest_to_its_limit_comes_first(llama, capsys):
    weight = "model.model.layers.1.mlp.up_proj.weight"
    plant(llama, weight, 1e12)
    torch.save(llama.state_dict(), "w.pt")
    found = answer(capsys, "checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS, "top=400")
    assert found["finite"] and found["line"] == "all values are finite"
    doublings = [margin["doublings"] for margin in found["nearest"]]
    assert doublings == sorted(doublings)
    (own,) = [m for m in found["nearest"] if m["value"] == pytest.approx(1e12, rel=1e-6)]
    assert own["module"] == "model.model.layers.1.mlp.up_proj"
    assert own["doublings"] == pytest.approx(math.log2(own["limit"] / 1e12))
    assert len(answer(capsys, "checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS)["nearest"]) == 10
    assert diagnose.main(["checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS]) == 0
    assert "closest to their limits" in capsys.readouterr().out


def test_a_narrower_type_is_nearer_to_its_limit(llama, capsys):
    """A result that is no larger than what went in, in a type that ends at 65504."""
    torch.save(llama.state_dict(), "w.pt")
    arguments = ["checkpoint=w.pt", "batch=batch.npy", LLAMA, KWARGS, "precision=16-mixed"]
    nearest = answer(capsys, *arguments)["nearest"]
    assert all(m["limit"] == 65504 and m["doublings"] < 17 for m in nearest[:3])
    products = [m for m in nearest if m["quantity"] == "result of torch.nn.functional.linear"]
    assert products
    wide = answer(capsys, *arguments[:-1])["nearest"]
    assert wide[0]["doublings"] > 100


def test_a_small_divisor_is_a_margin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "divides.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Divides(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.table = nn.Embedding(20, 20)\n"
        "        self.scale = nn.Parameter(torch.tensor(1e-30))\n\n"
        "    def forward(self, tokens):\n"
        "        return self.table(tokens) * 1e-30 / self.scale\n"
    )
    from divides import Divides

    torch.save(Divides().state_dict(), "w.pt")
    np.save("batch.npy", np.zeros((1, 4), dtype=np.int64))
    found = answer(
        capsys, "checkpoint=w.pt", "batch=batch.npy", "target=divides:Divides", "top=100"
    )
    divisors = [m for m in found["nearest"] if m["quantity"].startswith("smallest divisor")]
    assert divisors[0]["value"] == pytest.approx(1e-30)
    # 1.2e-38 is the smallest normal number.
    assert divisors[0]["doublings"] == pytest.approx(math.log2(1e-30 / 1.1754944e-38), abs=0.01)


def test_of_several_batches_the_one_that_comes_nearest_counts(tiny, monkeypatch, capsys):
    folder = train(tiny, "recipe.accumulate=2")
    left = iter([7.0, 3.0])

    def headroom_of(task, loss_of, moments, batch):
        margin = Headroom(module="a", quantity="b", value=1.0, limit=2.0, doublings=next(left))
        return None, [margin]

    monkeypatch.setattr("src.postmortem.diagnosis.headroom_of", headroom_of)
    (nearest,) = answer(capsys, f"checkpoint={folder}")["nearest"]
    assert nearest["doublings"] == 3.0


class Foreign(pl.LightningModule):
    """Has a training step of its own, on a batch of its own form."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(width, width)

    def training_step(self, batch, batch_idx):
        return {"loss": F.mse_loss(self.inner(batch["x"]) / batch["scale"], batch["y"])}


def test_a_lightning_module_runs_its_own_training_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Foreign().state_dict()}, "own.ckpt")
    batch = {"x": torch.ones(2, 4), "y": torch.zeros(2, 4), "scale": torch.zeros(())}
    torch.save(batch, "batch.pt")
    target = "target=tests.postmortem.test_diagnosis:Foreign"
    found = answer(capsys, "checkpoint=own.ckpt", "batch=batch.pt", target)
    assert found["finding"]["operation"].endswith("div")
    assert found["finding"]["module"] == ""
    assert answer(capsys, "checkpoint=own.ckpt", "batch=batch.pt", target, "kwargs={width:4}")


class Gives(pl.LightningModule):
    """A training step whose loss is what it is told."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.scale, self.what = torch.nn.Parameter(torch.ones(2)), what

    def training_step(self, batch):
        print("said by the step")
        if self.what == "leaves":
            raise SystemExit(0)
        if self.what == "attached":
            self.optimizers().zero_grad()
        if self.what == "backward":
            return _Refuses.apply(self.scale.sum())
        if self.what == "detached":
            return self.scale.sum().detach()
        return {"many": self.scale}.get(self.what, self.scale.sum())


class _Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("no way back")


STEPS = {
    "leaves": "batch: the model does not accept it: SystemExit: 0",
    "attached": "Gives: its training_step needs a trainer, and there is none here",
    "backward": "ArithmeticError: no way back",
    "detached": "a loss of shape () without a gradient",
    "many": "a loss of shape (2,) with a gradient; must be a scalar",
}


@pytest.mark.parametrize("what", STEPS)
def test_a_step_that_is_none_gets_one_line(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(Gives().state_dict(), "w.pt")
    torch.save(torch.ones(2), "batch.pt")
    target = "target=tests.postmortem.test_diagnosis:Gives"
    arguments = ["checkpoint=w.pt", "batch=batch.pt", target]
    assert answer(capsys, *arguments)["finite"]
    assert diagnose.main([*arguments, f"kwargs={{what:{what}}}"]) == 2
    error = capsys.readouterr().err
    assert STEPS[what] in error
    assert error.count("\n") == 1 + error.count("said by the step\n")


FOREIGN = {
    "a config of its own": {"config": {"n_layer": 2}, "iter_num": 3},
    "an incident of its own": {"incident": {}},
    "a tokenizer of its own": {"tokenizer": {"vocab": 3}},
    "optimizers of another form": {"optimizer_states": [5, {"state": [1]}]},
    "a step of another form": {"global_step": "three"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_somebody_elses_may_hold_what_ours_hold(what, llama, capsys):
    torch.save({"model": llama.state_dict(), **FOREIGN[what]}, "own.pt")
    found = answer(capsys, "checkpoint=own.pt", "batch=batch.npy", LLAMA, KWARGS)
    assert found["finite"]
    assert found["precision"] == "32-true"
    assert found["reproduced"] is None


class Terms(MLPLanguageModel):
    """Brings a term of the loss that is NaN."""

    def extra_losses(self):
        return {"own": self.head.weight.sum() * math.nan}


def test_losses_of_the_models_own_are_examined_too(tmp_path, monkeypatch, shared_cache, capsys):
    monkeypatch.chdir(tmp_path)
    target = "tests.postmortem.test_diagnosis:Terms"
    pace = [*PACE, f"paths.cache={shared_cache}"]
    folder = train(pace, "model=external", f"model.target={target}")
    incident = folder / "incidents" / "step-1"
    found = answer(capsys, f"checkpoint={incident}", f"target={target}")
    assert found["reproduced"]
    assert found["finding"]["operation"] == "torch.Tensor.mul"
    assert found["recorded"] == record(folder)["incident"]["line"]
    # With another model it is not as recorded, and that is said.
    other = f"target={target.replace('Terms', 'MLPLanguageModel')}"
    assert answer(capsys, f"checkpoint={incident}", other)["reproduced"] is False
    assert diagnose.main([f"checkpoint={incident}", other]) == 0
    assert "differs from the record: step 1" in capsys.readouterr().err


def test_an_incident_is_run_again_as_it_was(tiny, capsys):
    crash = [*tiny, "ffn=moe_writeup_add", "ffn.router.bias_rate=150", "recipe.precision=32-true"]
    folder = train(crash)
    incident = record(folder)["incident"]
    place = folder / "incidents" / f"step-{incident['step']}"
    found = answer(capsys, f"checkpoint={place}")
    recorded = json.loads((place / "incident.json").read_text())
    assert found["finding"] == recorded["finding"]
    assert found["cause"] == recorded["cause"] == "router underflow"


def test_values_that_an_option_had_set_on_routers_are_set_again(tiny, capsys):
    crash = [*tiny, "ffn=moe_writeup_add", "ffn.router.bias_rate=150", "recipe.precision=32-true"]
    folder = train(crash)
    place = folder / "incidents" / f"step-{record(folder)['incident']['step']}"
    state = torch.load(place / "state.pt", weights_only=True)
    assert state["router_values"]
    for values in state["router_values"].values():
        values["norm_eps"] = 1e-20
    torch.save(state, place / "state.pt")
    found = answer(capsys, f"checkpoint={place}")
    assert found["finite"] and found["reproduced"] is False


def test_a_run_of_ours_is_run_on_the_batch_that_it_would_take_next(tiny, capsys, tmp_path):
    folder = train(tiny)
    found = answer(capsys, f"checkpoint={folder}", "top=1000")
    assert found["finite"]
    assert found["precision"] == "bf16-mixed"
    quantities = {margin["quantity"] for margin in found["nearest"]}
    assert "attention logits" in quantities
    assert "AdamW's second moment" in quantities
    assert any(name.startswith("smallest divisor") for name in quantities)
    (tmp_path / "some.txt").write_text("First Citizen: before we proceed any further")
    text = answer(capsys, f"checkpoint={folder}", "batch=some.txt", "precision=32-true")
    assert text["finite"] and text["precision"] == "32-true"


def test_an_external_run_takes_its_target_from_the_user(
    tmp_path, monkeypatch, shared_cache, capsys
):
    monkeypatch.chdir(tmp_path)
    target = "src.examples.mlp:MLPLanguageModel"
    folder = train(
        [*PACE, f"paths.cache={shared_cache}"],
        "model=external",
        f"model.target={target}",
        "model.kwargs={inner_dim:16}",
    )
    assert diagnose.main([f"checkpoint={folder}"]) == 2
    assert target in capsys.readouterr().err
    found = answer(capsys, f"checkpoint={folder}", f"target={target}")
    assert found["finite"]
    # Its kwargs are those of the run; others do not fit its weights.
    assert diagnose.main([f"checkpoint={folder}", f"target={target}", "kwargs={inner_dim:8}"]) == 2
    assert "does not fit the model" in capsys.readouterr().err


BAD = {
    "checkpoint=nowhere": "no such run folder or checkpoint",
    "checkpoint=text.txt": "is damaged or not a checkpoint",
    "checkpoint=w.pt": "target=null",
    f"checkpoint=w.pt {LLAMA} {KWARGS}": "batch=null",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=nowhere.npy": "batch=nowhere.npy: no such file",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=folder": "batch=folder: is a folder, must be a file",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=": "batch=: is empty",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=words.npy": "entries of <U1; must be integers",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=floats.npy": "entries of float64; must be integers",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=empty.npy": "damaged, or not an array",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=many.npy": "damaged, or not an array",
    f"checkpoint=list.pt {LLAMA} {KWARGS} batch=batch.npy": "does not fit the model",
    f"checkpoint=numbered.pt {LLAMA} {KWARGS} batch=batch.npy": "does not fit the model",
    f"checkpoint=objects.pt {LLAMA} {KWARGS} batch=batch.npy": "holds a argparse.Namespace",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=truth.pt": "must hold integers of shape",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=sparse.pt": "must hold integers of shape",
    "checkpoint=w.pt target=torch.nn:Identity batch=batch.npy": "without trainable parameters",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=text.txt": "the checkpoint has no tokenizer",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=text.npy": "damaged",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=large.npy": "the model does not accept it",
    f"checkpoint=w.pt {LLAMA} {KWARGS} batch=flat.npy": "(rows, time)",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy": "needs vocab_size and max_seq_len; type"
    " 'kwargs={vocab_size:...,max_seq_len:...}'",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy kwargs=3": "kwargs=3",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy kwargs={{1:2}}": "names must be text",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy precision=fp8": "precision=fp8",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy top=0": "top=0",
    f"checkpoint=w.pt {LLAMA} batch=batch.npy format=xml": "format=xml",
    "checkpoint=w.pt target=no_such:thing batch=batch.npy": "No module named 'no_such'",
    "checkpoint=w.pt target=src.examples.mlp batch=batch.npy": "package.module:callable",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, llama, capsys):
    torch.save(llama.state_dict(), "w.pt")
    with open("text.txt", "w") as file:
        file.write("not a checkpoint")
    with open("text.npy", "w") as file:
        file.write("no array")
    np.save("floats.npy", np.full((1, 5), 1.5))
    np.savez("many.npz", np.zeros((1, 5), dtype=np.int64))
    Path("many.npz").rename("many.npy")
    Path("empty.npy").touch()
    Path("folder").mkdir()
    torch.save({"state_dict": [1]}, "list.pt")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "objects.pt")
    torch.save(torch.ones(2, 5, dtype=torch.bool), "truth.pt")
    torch.save(torch.ones(2, 5, dtype=torch.long).to_sparse(), "sparse.pt")
    torch.save({1: torch.ones(2)}, "numbered.pt")
    np.save("words.npy", np.array(["a", "b"]))
    np.save("large.npy", np.full((1, 5), 77))
    np.save("flat.npy", np.zeros(5, dtype=np.int64))
    assert diagnose.main(case.split(" ")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert BAD[case] in error


def test_no_code_is_run_out_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"state_dict": MLPLanguageModel(vocab_size=5).state_dict(), "x": Evil()}, "w.pt")
    np.save("batch.npy", np.zeros((1, 5), dtype=np.int64))
    arguments = ["checkpoint=w.pt", "batch=batch.npy", "target=src.examples.mlp:MLPLanguageModel"]
    assert diagnose.main(arguments) == 2
    assert "ran" not in capsys.readouterr().out
