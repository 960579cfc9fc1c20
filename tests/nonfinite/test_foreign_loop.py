"""Guard and recorder in training loops of somebody else's, and the way back by src.diagnose."""

import json
import random
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from nonfinite import expose_router
from nonfinite.lightning import (
    ActivationWatch,
    EarlyWarning,
    GradientWatch,
    IncidentRecorder,
    RouterWatch,
    SpikeWatch,
    StepGuard,
    Thresholds,
)
from src import diagnose
from tests.training.harness import guard_config


def fit(
    task: pl.LightningModule,
    data: torch.Tensor | DataLoader,
    *callbacks: pl.Callback,
    **precision: Any,
) -> StepGuard:
    """Two steps with guard and recorder, in the working directory; a tensor makes two batches."""
    guard = StepGuard(guard_config(), max_steps=2, log_every=1)
    trainer = pl.Trainer(
        **precision,
        max_steps=2,
        callbacks=[guard, *callbacks, IncidentRecorder("incidents")],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    if isinstance(data, torch.Tensor):
        data = DataLoader(data, batch_size=len(data) // 2)
    trainer.fit(task, data)
    return guard


def recorded() -> dict:
    return json.loads(Path("incidents/step-1/incident.json").read_text())


def diagnosed(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert diagnose.main(["checkpoint=incidents/step-1", *arguments, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Products(pl.LightningModule):
    """Overflows where products are in float16 and the weights not small."""

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(self.inner.weight, weight)

    def training_step(self, batch, batch_idx):
        return self.inner(batch.to(self.inner.weight.dtype)).float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def half() -> dict[str, Any]:
    """Lightning gives float16 on the CPU to those alone who bring the plugin."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}


LARGE = torch.full((4, 4), 3e3)
PRODUCTS = "target=tests.nonfinite.test_foreign_loop:Products"


def test_an_incident_in_float16_is_run_in_float16(capsys):
    fit(Products(), LARGE, **half())
    assert recorded()["finding"]["dtype"] == "float16"
    found = diagnosed(capsys, PRODUCTS)
    assert found["precision"] == "16-mixed"
    assert found["finding"] == recorded()["finding"]
    assert found["cause"] == recorded()["cause"] == "float16 overflow"
    assert diagnosed(capsys, PRODUCTS, "precision=bf16-mixed")["finite"]


def test_an_incident_in_another_precision_is_refused_until_one_is_chosen(capsys):
    fit(Products(), torch.full((4, 4), torch.inf))
    state = torch.load("incidents/step-1/state.pt", weights_only=True)
    torch.save({**state, "precision": "transformer-engine"}, "incidents/step-1/state.pt")
    assert diagnose.main(["checkpoint=incidents/step-1", PRODUCTS]) == 2
    assert "precision=null: the step was recorded in transformer-engine" in capsys.readouterr().err
    assert diagnosed(capsys, PRODUCTS, "precision=32-true")["precision"] == "32-true"


class Divides(Products):
    """Takes the batch as it comes, in whatever type."""

    def training_step(self, batch, batch_idx):
        return (self.inner(batch) / (batch - batch)).mean()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_an_incident_in_a_whole_precision_is_run_in_it(precision, capsys):
    fit(Divides(), torch.randn(4, 4), precision=precision)
    target = "target=tests.nonfinite.test_foreign_loop:Divides"
    found = diagnosed(capsys, target)
    assert found["precision"] == precision
    assert found["finding"] == recorded()["finding"]
    assert found["reproduced"]
    # The batch that was recorded has the type that it had then.
    assert diagnosed(capsys, target, "precision=32-true")["finding"]["dtype"] == "float32"


def test_what_the_scaler_of_the_loss_finds_by_itself_is_no_incident():
    guard = fit(Products(weight=1e-4), LARGE, **half())
    assert guard.summary()["nonfinite_grad_steps"] == 2
    assert guard.summary()["nonfinite_loss_steps"] == 0
    assert not Path("incidents").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_named_and_not_what_it_spoils(value, capsys):
    batch = torch.ones(4, 4)
    batch[0, 1] = value
    fit(Products(weight=1.0), batch)
    incident = recorded()
    assert incident["finding"]["phase"] == "batch"
    assert incident["cause"] == "bad batch"
    assert incident["line"] == "step 1: batch: 1 of 8 elements were not finite before the step"
    found = diagnosed(capsys, PRODUCTS)
    assert found["reproduced"] and not found["finite"]


class Gated(pl.LightningModule):
    """Weights experts by the normalized sigmoids of a gate, all of which are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(self.gate.bias, -200.0)

        def read(logits):
            return logits, logits.topk(2).indices

        expose_router(self.gate, num_experts=3, read=read, sigmoid=True)

    def training_step(self, batch, batch_idx):
        picked = self.gate(batch).topk(2).values.sigmoid()
        return (picked / picked.sum(-1, keepdim=True)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_gate_that_was_exposed_says_how_many_of_its_sums_are_zero(capsys):
    """The division is not the gate's own code, so the gate is not what is named."""
    fit(Gated(), torch.randn(4, 4))
    assert recorded()["finding"]["operation"] == "torch.Tensor.div"
    assert diagnosed(capsys, "target=tests.nonfinite.test_foreign_loop:Gated")["finding"]


class Draws(Products):
    """Divides by 0 where it draws what it drew the first time."""

    first = None

    def training_step(self, batch, batch_idx):
        drawn = torch.rand(()) + random.random() + np.random.rand()
        if self.first is None:
            self.first = drawn
        return (self.inner(batch) / (drawn != self.first)).mean()


def test_what_the_step_drew_is_drawn_again():
    guard = fit(Draws(), torch.ones(4, 4))
    assert guard.summary()["nonfinite_steps"] == [1]
    assert recorded()["finding"]["operation"] == "torch.Tensor.div"


class Logs(Products):
    """Logs what it sees, by every way out of a training step, and divides by 0 in the first."""

    def training_step(self, batch, batch_idx):
        self.log("rows", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"mean": self.inner(batch).mean()}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"step": float(batch_idx)})
        return (self.inner(batch) / batch_idx).mean()


class Lines(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append(dict(metrics))


def test_what_a_step_logs_is_logged_once():
    def logged(*recorder: IncidentRecorder):
        guard, lines = StepGuard(guard_config(), max_steps=2, log_every=9), Lines()
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[guard, *recorder],
            logger=lines,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(0)
        trainer.fit(Logs(weight=1.0), DataLoader(torch.ones(4, 4), batch_size=2))
        assert guard.summary()["nonfinite_steps"] == [1]
        return {name: value.item() for name, value in trainer.callback_metrics.items()}, lines.lines

    assert logged(IncidentRecorder(Path("incidents"))) == logged()
    assert recorded()["finding"]["operation"] == "torch.Tensor.div"


class Hoards(Draws):
    """Remembers in what is changed in place, and draws from Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.seen = torch.zeros(()), []

    def training_step(self, batch, batch_idx):
        self.mean += batch.mean() + random.random()
        self.seen.append(batch_idx)
        return super().training_step(batch, batch_idx) * len(self.seen)


def test_what_a_module_remembers_is_remembered_once(tmp_path):
    def seen(*recorder: IncidentRecorder):
        random.seed(0)
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_steps=2,
            callbacks=[StepGuard(guard_config(), max_steps=2, log_every=1), *recorder],
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        task = Hoards()
        trainer.fit(task, DataLoader(torch.ones(4, 4), batch_size=2))
        return task.mean.item(), task.seen

    assert seen(IncidentRecorder(Path("incidents"))) == seen() == (seen()[0], [0, 1])
    assert recorded()["step"] == 1


def test_callbacks_follow_one_run(monkeypatch):
    """Steps of another run would be taken for steps that have been seen."""
    callbacks: list[pl.Callback] = [StepGuard(guard_config(), max_steps=2, log_every=1)]
    callbacks += [IncidentRecorder(Path("incidents")), EarlyWarning()]

    def run(max_steps: int) -> pl.Trainer:
        return pl.Trainer(
            max_steps=max_steps,
            callbacks=callbacks,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )

    batches = DataLoader(torch.ones(4, 4), batch_size=2)
    trainer = run(2)
    trainer.fit(Products(), batches)
    guard = StepGuard.of(trainer)
    num_observers = len(guard.observers)
    # The same run may go on.
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 9, 4
    trainer.fit(Products(), batches)
    assert trainer.global_step == 4
    assert len(guard.observers) == num_observers == 1
    with pytest.raises(ValueError, match="has been used in a run up to step 4"):
        run(2).fit(Products(), batches)


def test_the_length_of_a_run_may_be_given_in_epochs():
    early = EarlyWarning()
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[early],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Products(), DataLoader(torch.ones(10, 4), batch_size=2))
    assert early.max_steps == 15


class Manual(Products):
    def __init__(self, num_optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization, self.num = False, num_optimizers

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers() if self.num > 1 else [self.optimizers()]:
            optimizer.zero_grad()
            self.manual_backward(self.inner(batch).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(self.num)]


@pytest.mark.parametrize("num_optimizers", [1, 2])
def test_manual_optimization_is_refused_in_one_sentence(num_optimizers):
    with pytest.raises(ValueError, match=f"Manual has {num_optimizers} under manual optimization"):
        fit(Manual(num_optimizers), torch.ones(4, 4))


class Several(torch.optim.SGD):
    """Computes loss and gradient twice a step."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


class Optimized(Products):
    def __init__(self, optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.0)


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, Several])
def test_an_optimizer_that_computes_the_loss_several_times_a_step_is_refused(optimizer):
    named = f"loss and gradient once per step; {optimizer.__name__} computes them several times"
    with pytest.raises(ValueError, match=named):
        fit(Optimized(optimizer), torch.ones(4, 4), GradientWatch(every=1))


def test_what_is_no_setting_of_an_instrument_is_refused_with_its_value():
    guard = StepGuard(guard_config(), max_steps=2, log_every=1)
    for every in (0, -1, None, 1.5, True):
        for make in (
            GradientWatch,
            ActivationWatch,
            RouterWatch,
            lambda every: SpikeWatch(guard, every=every),
        ):
            with pytest.raises(ValueError, match=f"every={every}: must be an integer, at least 1"):
                make(every=every)
    for make, settings in (
        (Thresholds, {"window": 2}),
        (Thresholds, {"sigmas": -1.0}),
        (Thresholds, {"way_frac": 1.0}),
        (Thresholds, {"horizon_frac": 0.0}),
        (EarlyWarning, {"float_max": -1.0}),
        (EarlyWarning, {"max_steps": 0}),
        (guard_config, {"check": "loss"}),
        (guard_config, {"check": ["weights"]}),
    ):
        ((field, value),) = settings.items()
        with pytest.raises(ValueError, match=re.escape(f"{field}={value}: must be")):
            make(**settings)
    for wrong in ({"max_steps": 0, "log_every": 1}, {"max_steps": 1, "log_every": 0}):
        with pytest.raises(ValueError, match="=0: must be at least 1"):
            StepGuard(guard_config(), **wrong)
