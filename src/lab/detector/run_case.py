"""Trains a public case: in a plain loop, under `watch`, or in Lightning with all callbacks."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nonfinite import watch
from nonfinite.lightning import (
    ActivationWatch,
    EarlyWarning,
    GradientWatch,
    GuardConfig,
    IncidentRecorder,
    SpikeWatch,
    StepGuard,
)
from src.lab.detector.public_cases.case_list import LIGHTNING, PublicCase
from src.lab.detector.public_cases.public_failure import Batch, PublicFailure


def train_plainly(
    case: PublicCase,
    model: PublicFailure,
    optimizer: torch.optim.Optimizer,
    call: Callable[[nn.Module, Batch], Any] = lambda model, inputs: model(*inputs),
) -> Iterator[tuple[int, bool]]:
    """Trains in a plain loop that checks nothing.

    Args:
        case: which case.
        model, optimizer: what `case.build` returned.
        call: calls the model with the inputs of a batch.

    Yields:
        The step, from 1, and whether all its losses are finite: once after the backward pass, and
        once after the optimizer's step.
    """
    num_batches, batches = case.model.num_micro_batches, case.batches
    for step in range(len(batches) // num_batches):
        optimizer.zero_grad()
        is_finite = True
        for batch in batches[step * num_batches : (step + 1) * num_batches]:
            loss = model.loss_of(call(model, batch[: case.model.num_inputs]), batch)
            loss.backward()
            is_finite = is_finite and bool(loss.isfinite())
        yield step + 1, is_finite
        optimizer.step()
        yield step + 1, is_finite


def first_failure(case: PublicCase) -> tuple[int, str] | None:
    """The first step whose loss or gradient, or whose weights after it, are not finite.

    Returns:
        The step, and which of the three: loss, gradient or weights. None: nothing fails.
    """
    model, optimizer = case.build()
    for step, loss_is_finite in train_plainly(case, model, optimizer):
        if not loss_is_finite:
            return step, "loss"
        if not all(_is_finite(p.grad) for p in model.parameters() if p.grad is not None):
            return step, "gradient"
        if not all(p.isfinite().all() for p in model.parameters()):
            return step, "weights"
    return None


def _is_finite(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.isfinite().all())


def _discard(line: str) -> None:
    """The incident holds what the line says."""


class _Task(pl.LightningModule):
    """Trains a model that returns its loss."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self.made = model, optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.made


def _train_in_lightning(case: PublicCase, folder: Path) -> None:
    assert case.model.loss is None, "the task returns the model's output as the loss"
    model, optimizer = case.build()
    batches, num_batches = case.batches, case.model.num_micro_batches
    guard = StepGuard(
        GuardConfig(
            check=["loss", "gradients"], on_nonfinite="skip", max_consecutive=None, on_alarm="none"
        ),
        max_steps=len(batches) // num_batches,
        log_every=2,
    )
    callbacks: list[pl.Callback] = [
        guard,
        GradientWatch(every=2),
        SpikeWatch(guard, every=2),
        ActivationWatch(every=2),
        EarlyWarning(say=_discard),
        IncidentRecorder(folder, say=_discard),
    ]
    trainer = pl.Trainer(
        max_steps=len(batches) // num_batches,
        callbacks=callbacks,
        accumulate_grad_batches=num_batches,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    # A list serves as a data set, which the types of DataLoader do not say.
    data: Any = batches
    trainer.fit(_Task(model, optimizer), DataLoader(data, batch_size=None))


def _train_under_watch(case: PublicCase, folder: Path) -> None:
    model, optimizer = case.build()
    batch: Batch = ()
    loss_of: Callable[[Any], Tensor] | None = None
    if model.loss is not None:
        loss_of = lambda output: model.loss_of(output, batch)  # noqa: E731
    watch(model, optimizer, on_nonfinite="skip", folder=folder, loss_of=loss_of, say=_discard)
    for batch in case.batches:
        optimizer.zero_grad()
        output = model(*batch[: case.model.num_inputs])
        model.loss_of(output, batch).backward()
        optimizer.step()


def incident_of(case: PublicCase, folder: Path) -> dict[str, Any] | None:
    """Trains the case with `nonfinite`, in the case's own loop.

    Args:
        case: which case.
        folder: an empty folder for the incidents.

    Returns:
        The first incident that is not a spike, as recorded; None if there is none.
    """
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    train = _train_in_lightning if case.loop == LIGHTNING else _train_under_watch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(case, folder)
    finally:
        lightning.setLevel(level)
    files = sorted(folder.glob("step-*/incident.json"), key=lambda file: int(file.parent.name[5:]))
    for file in files:
        incident: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if incident["cause"] != "spike":
            return incident
    return None
