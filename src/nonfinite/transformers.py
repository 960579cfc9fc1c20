"""`Nonfinite()` for transformers' Trainer: does what `watch` does.

trainer = Trainer(..., callbacks=[Nonfinite()])
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nonfinite.watch import watch
from nonfinite.watched_steps import Watch


class Nonfinite(TrainerCallback):
    """Watches the Trainer's model and optimizer.

    Args:
        options: keyword arguments of `watch`. With `on_nonfinite="stop"` the training ends.

    Attributes:
        handle: what `watch` returned; None before the training starts.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.handle: Watch | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds the hooks; accelerate wraps the optimizer."""
        self.handle = watch(model, getattr(optimizer, "optimizer", optimizer), **self.options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None and self.handle.stopped:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the hooks; the handle keeps what was recorded."""
        if self.handle is not None:
            self.handle.close()
