"""`audit=true`: says before the first step what of a run could go non-finite."""

import math

import torch
from torch import nn

from nonfinite.auditing import Audit, audit
from src.config.run_config import RunConfig
from src.data import Corpus, TrainBatches
from src.postmortem.audit_target import StepModule
from src.postmortem.load import LossStep

SECONDS = 30.0
"""The search ends after this time, so that a large model does not wait for long."""

ROWS = 2
"""Rows of the first batch that the audit runs on."""

LABELS = ("cross_entropy",)
"""A batch of this project has a label for every token."""


def audit_of_run(config: RunConfig, model: nn.Module, corpus: Corpus) -> Audit:
    """The audit of a run's model, on rows of its first batch and in its precision.

    Args:
        config: the run's configuration.
        model: the initialised model; it is not changed.
        corpus: the text to train on.
    """
    recipe = config.recipe
    batches = TrainBatches(
        corpus.train, seed=config.seed, batch_size=recipe.batch_size, seq_len=recipe.seq_len
    )
    tokens, targets = batches.batch(0)
    step = StepModule(LossStep(model, z_loss_weight=recipe.z_loss_weight).train())
    return audit(
        step,
        ((tokens[:ROWS], targets[:ROWS]),),
        dtypes=[dtype_of(recipe.precision)],
        mixed=recipe.precision.endswith("mixed"),
        seconds=SECONDS,
        folder=config.folder / "audit",
        allow=LABELS,
    )


def dtype_of(precision: str) -> torch.dtype:
    """The narrowest dtype of a precision by Lightning's name."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def warnings_before_start(config: RunConfig, model: nn.Module, corpus: Corpus) -> list[str]:
    """A line for each operation within reach, and for an optimizer or schedule that cannot work."""
    recipe = config.recipe
    found = optimizer_warnings(eps=recipe.eps, precision=recipe.precision, rates=rates_of(config))
    answer = audit_of_run(config, model, corpus)
    for sites in answer.places:
        site = sites[0]
        witness = site.best
        found.append(
            f"audit: {site.limit} within reach at {site.place} ({witness.dtype}): {witness.how};"
            f" {site.advice}"
        )
    return found


def rates_of(config: RunConfig) -> list[float]:
    """The learning rate of every step."""
    recipe = config.recipe
    return [recipe.learning_rate * recipe.lr_factor(step) for step in range(recipe.max_steps)]


def optimizer_warnings(*, eps: float, precision: str, rates: list[float]) -> list[str]:
    """What is wrong with the update itself, whatever the gradients are.

    Args:
        eps: Adam's epsilon.
        precision: by Lightning's name.
        rates: the learning rate of each step.
    """
    found = []
    true = {"16-true": torch.float16, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    if float(torch.tensor(eps, dtype=torch.float64).to(true)) == 0.0:
        name = str(true).removeprefix("torch.")
        found.append(
            f"audit: recipe.eps={eps:g} is 0 in {name}: a weight whose gradient is 0 becomes NaN in"
            " the first update; type recipe.eps=1e-4 or another precision"
        )
    bad = [step for step, rate in enumerate(rates) if not math.isfinite(rate)]
    if bad:
        found.append(f"audit: the learning rate of step {bad[0] + 1} is {rates[bad[0]]}")
    return found
