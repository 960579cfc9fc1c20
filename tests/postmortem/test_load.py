"""The step of a run of ours, whose model is somebody else's."""

import json

import lightning.pytorch as pl
import pytest
import torch

from src import diagnose
from src.examples.mlp import MLPLanguageModel
from tests.conftest import PACE
from tests.runs import record, train


class Stepping(pl.LightningModule):
    """A LightningModule that serves as a model; its own training step is none of the run's."""

    def __init__(self, vocab_size: int, fails: bool = True) -> None:
        super().__init__()
        self.inner, self.fails = MLPLanguageModel(vocab_size=vocab_size), fails

    def forward(self, tokens):
        x = self.inner(tokens)
        return x / (x - x) if self.training and self.fails else x

    def training_step(self, batch, batch_idx):
        raise AssertionError("not to be called")


@pytest.fixture
def pace(tmp_path, monkeypatch, shared_cache):
    monkeypatch.chdir(tmp_path)
    return [*PACE, f"paths.cache={shared_cache}", "recipe.precision=32-true", "model=external"]


def answer(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert diagnose.main([*arguments, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


TARGET = "tests.postmortem.test_load:Stepping"


def test_a_run_of_ours_never_calls_a_training_step_of_its_model(pace, capsys):
    folder = train(pace, f"model.target={TARGET}")
    place = folder / "incidents" / "step-1"
    found = answer(capsys, f"checkpoint={place}", f"target={TARGET}")
    assert found["reproduced"]
    assert found["finding"]["module"] == record(folder)["incident"]["module"] == "model"
    healthy = answer(capsys, f"checkpoint={folder}", f"target={TARGET}", "kwargs={fails:false}")
    assert healthy["finite"]


class Large(MLPLanguageModel):
    """Logits whose logsumexp has a square that overflows."""

    def forward(self, tokens):
        return super().forward(tokens) + 1e20


def test_the_loss_of_a_run_has_its_z_loss(pace, capsys):
    target = "tests.postmortem.test_load:Large"
    folder = train(pace, f"model.target={target}", "recipe.z_loss_weight=0.1")
    found = answer(capsys, f"checkpoint={folder / 'incidents' / 'step-1'}", f"target={target}")
    assert found["reproduced"]
    assert found["finding"]["operation"] == "torch.Tensor.square"
    assert torch.is_grad_enabled()
