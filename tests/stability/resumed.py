"""A remedy in a small run that is interrupted and resumed, beside one that is not."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import FSDPStrategy

from tests.runs import assert_same_tree
from tests.training.harness import Harness, recipe_config


class Jolt(pl.Callback):
    """Makes the gradients of some steps larger, as bad batches would."""

    def __init__(self, *steps: int, factor: float = 1e4) -> None:
        self.steps, self.factor = steps, factor

    def on_after_backward(self, trainer, pl_module) -> None:
        is_last = not trainer.fit_loop._should_accumulate()
        if trainer.global_step + 1 in self.steps and is_last:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.factor


class Save(pl.Callback):
    """Saves a checkpoint after a step; must be the last callback."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and not self.file.exists():
            trainer.save_checkpoint(self.file)


def assert_resumed_is_whole(
    callbacks: Callable[[], list[pl.Callback]],
    file: Path,
    *,
    stop_at: int,
    recipe: dict[str, Any],
    **harness: Any,
) -> Harness:
    """Bitwise equal: weights, optimizer, the remedy's state and what it logs, after every step.

    Returns:
        The run that was not interrupted.
    """
    whole = Harness(
        recipe=recipe_config(**recipe), callbacks=[*callbacks(), Save(stop_at, file)], **harness
    ).fit()
    resumed = Harness(recipe=recipe_config(**recipe), callbacks=callbacks(), **harness).fit(file)
    num_rest = len(resumed.states)
    assert num_rest == (resumed.recipe.max_steps - stop_at) * resumed.recipe.accumulate
    assert_same_tree(resumed.states, whole.states[-num_rest:])
    for step, line in resumed.recorder.lines.items():
        # As text, in which NaN equals NaN and every bit of a number shows.
        assert repr(line) == repr(whole.recorder.lines[step])
    for one, two in zip(resumed.callbacks, whole.callbacks, strict=False):
        assert_same_tree(one.state_dict(), two.state_dict())
    return whole


def assert_absent(callback: pl.Callback, *others: pl.Callback, **recipe: Any) -> Harness:
    """Where a remedy does not act, every step is bitwise the baseline's.

    Returns:
        The run with the remedy.
    """
    plain = Harness(recipe=recipe_config(**recipe), callbacks=list(others)).fit()
    treated = Harness(recipe=recipe_config(**recipe), callbacks=[*others, callback]).fit()
    assert_same_tree(plain.states, treated.states)
    return treated


def assert_sharded_is_refused(callback: pl.Callback, name: str) -> None:
    """In one line, before the first step."""
    strategy = FSDPStrategy.__new__(FSDPStrategy)
    trainer = SimpleNamespace(strategy=strategy, global_step=0, optimizers=[], callbacks=[callback])
    with pytest.raises(ValueError, match=f"^strategy=FSDPStrategy: {name} needs whole tensors"):
        callback.on_train_start(trainer, None)
