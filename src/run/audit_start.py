"""`audit=true`: says before the first step what of a run could go non-finite."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from nonfinite.auditing import Audit, audit
from src.config.run_config import RunConfig
from src.data import Corpus, TrainBatches
from src.postmortem.audit_target import StepModule, in_own_words
from src.postmortem.load import LossStep
from src.training.recipe import RecipeConfig
from src.training.task import build_optimizer

SECONDS = 30.0
"""The search ends after this time, so that a large model does not wait for long."""

ROWS = 2
"""Rows of the first batch that the audit runs on."""

LABELS = ("cross_entropy",)
"""A batch of this project has a label for every token."""

TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
"""Precisions that convert the weights."""

MANY = 10_000
"""Of a run with more steps than this, the learning rate of some steps alone is looked at."""


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
    found = audit(
        step,
        ((tokens[:ROWS], targets[:ROWS]),),
        dtypes=[dtype_of(recipe.precision)],
        mixed=recipe.precision.endswith("mixed"),
        seconds=SECONDS,
        folder=config.folder / "audit",
        allow=LABELS,
    )
    return in_own_words(found, step)


def dtype_of(precision: str) -> torch.dtype:
    """The narrowest dtype of a precision by Lightning's name."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype in which weights are kept and updated, by Lightning's name of a precision."""
    return TRUE.get(precision, torch.float32)


def warnings_before_start(config: RunConfig, model: nn.Module, corpus: Corpus) -> list[str]:
    """A line for each operation within reach, and for an optimizer or schedule that cannot work."""
    found = rate_warnings(config)
    found += update_warnings(
        config.recipe,
        dtype=weight_dtype(config.recipe.precision),
        replace_optimizer=config.replace_optimizer,
    )
    answer = audit_of_run(config, model, corpus)
    for sites in answer.places:
        site = sites[0]
        witness = site.best
        found.append(
            f"audit: {site.limit} within reach at {site.place} ({witness.dtype}): {witness.how};"
            f" {site.advice}"
        )
    return found


def rate_warnings(config: RunConfig) -> list[str]:
    """A line for the first step whose learning rate is not finite, and what makes it so."""
    recipe = config.recipe
    parts: dict[str, Callable[[int], float]] = {
        f"recipe.schedule={recipe.schedule}": recipe.lr_factor
    }
    for name, remedy in config.remedies.items():
        parts[f"stability={name}"] = partial(remedy.lr_factor, max_steps=recipe.max_steps)
    for step in looked_at(recipe.max_steps, begin=recipe.warmup_steps):
        for name, factor in parts.items():
            try:
                value = factor(step)
            # A division of 0 by 0, or a root or logarithm outside its domain.
            except (ArithmeticError, ValueError) as error:
                return [f"audit: the learning rate of step {step + 1} fails: {name} ({error})"]
            if not math.isfinite(value):
                return [f"audit: the learning rate of step {step + 1} is {value}: {name}"]
    return []


def looked_at(max_steps: int, *, begin: int) -> list[int]:
    """The steps whose rate is computed: all of a short run; of a long one those near its edges.

    Args:
        max_steps: of the run.
        begin: where the warm-up ends.
    """
    if max_steps <= MANY:
        return list(range(max_steps))
    near = MANY // 10
    edges = (0, begin, max_steps)
    found = {step for edge in edges for step in range(edge - near, edge + near)}
    found |= {max_steps * part // MANY for part in range(MANY)}
    return sorted(step for step in found if 0 <= step < max_steps)


def update_warnings(
    recipe: RecipeConfig,
    *,
    dtype: torch.dtype,
    replace_optimizer: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer],
) -> list[str]:
    """A line if the run's optimizer spoils weights of a dtype in its first step.

    The optimizer updates two small layers, once with gradients of 0 and once with gradients whose
    squares are 0 in the dtype: Adam then divides by its epsilon alone.

    Args:
        recipe: optimizer and rate.
        dtype: of the weights.
        replace_optimizer: see RunConfig.
    """
    least = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    for gradient in (0.0, math.sqrt(least) / 2):
        optimizer = _failing_optimizer(recipe, dtype, gradient, replace_optimizer)
        if optimizer is not None:
            return [_told(recipe, dtype, gradient, optimizer)]
    return []


def _told(recipe: RecipeConfig, dtype: torch.dtype, gradient: float, optimizer: str) -> str:
    name = str(dtype).removeprefix("torch.")
    if float(torch.tensor(recipe.eps, dtype=torch.float64).to(dtype)) == 0.0:
        typed = "1e-4" if dtype == torch.float16 else "1e-8"
        return (
            f"audit: recipe.eps={recipe.eps:g} is 0 in {name}: a weight whose gradient is"
            f" {gradient:.3g} becomes NaN or Inf in the first update by {optimizer}; type"
            f" recipe.eps={typed} or another precision"
        )
    return (
        f"audit: a weight in {name} whose gradient is {gradient:.3g} becomes NaN or Inf in the"
        f" first update by {optimizer} (recipe.eps={recipe.eps:g}); type a larger epsilon or"
        " another precision"
    )


def _failing_optimizer(
    recipe: RecipeConfig,
    dtype: torch.dtype,
    gradient: float,
    replace_optimizer: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer],
) -> str | None:
    """The name of the run's optimizer if its first step on such gradients is not finite."""
    # The random state of the run must stay as it is.
    with torch.random.fork_rng():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    try:
        optimizer = replace_optimizer(build_optimizer(module.parameters(), recipe), module)
        optimizer.step()
    except Exception:  # a user's optimizer may need a model of another kind
        return None
    is_finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    return None if is_finite else type(optimizer).__name__
