"""A recorded step, run again."""

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

from src.diagnose import main as diagnose
from src.replay import main as replay
from tests.nonfinite.test_recorder import FAILING
from tests.runs import ROOT, made, record, train


@pytest.fixture
def failed(tiny):
    folder = made(tiny, *FAILING)
    (incident,) = folder.glob("incidents/step-*")
    return incident


def test_replay_makes_the_same_tensor_bitwise_in_a_fresh_process(failed):
    done = subprocess.run(
        [sys.executable, "-m", "src.replay", f"incident={failed}", "format=json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    answer = json.loads(done.stdout)
    assert answer["reproduced"]
    assert (
        answer["finding"]["digest"]
        == json.loads((failed / "incident.json").read_text())["finding"]["digest"]
    )


def test_replay_says_where_it_was_recorded_when_its_numbers_are_others(failed, capsys):
    state = torch.load(failed / "state.pt", weights_only=True)
    assert state["device"] == "cpu"
    state["device"], state["incident"]["finding"]["digest"] = "cuda", "0" * 64
    torch.save(state, failed / "state.pt")
    capsys.readouterr()
    assert replay([f"incident={failed}"]) == 0
    said = capsys.readouterr().out
    assert "same operation, but other values: recorded on cuda, run on cpu" in said
    assert diagnose([f"checkpoint={failed}"]) == 0
    assert "same operation, but other values than recorded on cuda: step" in capsys.readouterr().err
    state["incident"]["finding"]["operation"] = "torch.Tensor.exp"
    del state["device"]
    torch.save(state, failed / "state.pt")
    assert replay([f"incident={failed}", "format=json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["alike"], answer["recorded_on"], answer["run_on"]) == (False, "cpu", "cpu")
    assert replay([f"incident={failed}"]) == 0
    assert "differs from the record" in capsys.readouterr().out
    assert diagnose([f"checkpoint={failed}"]) == 0
    assert "differs from the record: step" in capsys.readouterr().err
    torch.save(state | {"device": "tpu"}, failed / "state.pt")
    assert replay([f"incident={failed}"]) == 2
    assert "device has unexpected content" in capsys.readouterr().err


def test_replay_knows_what_an_option_had_changed_in_the_running_router(tiny, capsys):
    # The epsilon is in force, so what fails in the end is not the gate.
    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 10:
                with torch.no_grad():
                    pl_module.model.final_norm.weight.fill_(3e38)

    inner = pl.Trainer.__init__

    def with_overflow(self, *args, **kwargs):
        inner(self, *args, **(kwargs | {"callbacks": [Overflow(), *kwargs["callbacks"]]}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "__init__", with_overflow)
        folder = train(
            tiny, *FAILING, "stability=router_eps", "stability.router_eps.start_frac=0.0"
        )
    (incident,) = folder.glob("incidents/step-*")
    assert record(folder)["incident"]["step"] == 11
    assert not record(folder)["incident"]["module"].endswith("router")
    capsys.readouterr()
    assert replay([f"incident={incident}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["reproduced"]


@pytest.mark.parametrize(
    ("change", "averted"),
    [
        ("+with.ffn.router.norm_eps=1e-9", True),
        ("+with.ffn.router.bias_use=select", True),
        ("+with.recipe.z_loss_weight=0.1", False),
    ],
)
def test_replay_says_whether_a_change_would_have_averted_the_step(change, averted, failed, capsys):
    capsys.readouterr()
    assert replay([f"incident={failed}", change, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["averted"] == averted


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["incident=nowhere"], ["incident=nowhere", "no such folder", "incidents/step-<n>"]),
        ([], ["incident", "has no value"]),
        (["+with.ffn.router.foo=1"], ["with.ffn.router.foo: unknown field", "norm_eps"]),
        (["+with.ffn.router.norm_epss=1"], ["with.ffn.router.norm_epss", "did you mean norm_eps?"]),
        (["+with.ffn.top_kk=1"], ["with.ffn.top_kk", "did you mean top_k?"]),
        (["+with.recipe.z_los_weight=1"], ["with.recipe.z_los_weight", "z_loss_weight"]),
        (["with.ffn.router.norm_eps=1e-20"], ["type +with.ffn.router.norm_eps=1e-20"]),
        (["+wiht.ffn.top_k=1"], ["wiht: unknown field; did you mean with?"]),
        (["+with.ffn.top_k=99"], ["with.ffn.top_k=99", "from 1 to"]),
        (["+with.model.hidden_dim=48"], ["with", "shape"]),
        (["+with.recipe.precision=bf16-mixed"], ["with.recipe.precision", "z_loss_weight"]),
        (["+with.data.path=x"], ["with.data", "model, attention, ffn, recipe"]),
        (["format=xml"], ["format=xml", "text, json"]),
    ],
)
def test_bad_replays_get_one_line(arguments, parts, failed, capsys):
    capsys.readouterr()
    if arguments and not arguments[0].startswith("incident"):
        arguments = [f"incident={failed}", *arguments]
    assert replay(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in parts)
