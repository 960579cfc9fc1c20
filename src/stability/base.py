"""The interface of a remedy: config overrides, a factor on the learning rate, or callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from src.common.nested_values import value_at

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import torch
    from torch import nn

ROUTER = "ffn.router"
"""The section of the configuration that router remedies need."""

Role = Literal["remedy", "aa_control", "positive_control"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about a run that a remedy may use."""

    max_steps: int
    """Length of the run in optimizer steps; fractions of the run refer to it."""
    log_every: int
    """Steps between two logged lines."""
    seed: int
    repeat: int
    clip_norm: float | None
    """The bound on the gradient norm; None: the norm is not clipped."""

    def step_at(self, frac: float) -> int:
        """The last step of the first `frac` of the run."""
        return round(frac * self.max_steps)


@dataclass(kw_only=True)
class RemedyConfig:
    """Base class of the remedies. A remedy that is off leaves a run bitwise as it is.

    Sections of the configuration are passed to the methods as `parts`, by name.
    """

    role: ClassVar[Role] = "remedy"
    """The remedy's role in a study. An A/A control differs from the baseline by chance alone. A
    positive control is known to work: a study that cannot detect it cannot rank the others."""
    is_passive: ClassVar[bool] = False
    """Whether training stays bitwise the baseline's, so that a baseline run can carry it."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers, so that changing `repeat` changes the run."""
    ends_early: ClassVar[bool] = False
    """Whether it ends training on purpose; reports then do not count the end as a failure."""
    keeps_average: ClassVar[bool] = False
    """Whether it holds a second copy of the weights, which takes memory."""
    replaces_optimizer: ClassVar[bool] = False
    """Whether it has an optimizer of its own, whose state fits no run without the remedy."""
    evaluated_as: ClassVar[str | None] = None
    """The evaluation weights by which a run is judged: its loss is `val_<evaluated_as>/loss`. None:
    the trained weights, `val/loss`."""

    @classmethod
    def roles(cls) -> dict[str, Any]:
        """What reports need to know about the remedy.

        record.json holds these values, so that a report can judge a remedy it has never heard of.
        """
        names = ("role", "evaluated_as", "ends_early", "keeps_average")
        return {name: getattr(cls, name) for name in names}

    def start_step(self, parts: Mapping[str, Any]) -> int:
        """The number of steps that stay bitwise the baseline's before the remedy acts.

        Default: the steps before `start_frac` if the remedy has that field, else 0.
        """
        max_steps = int(parts["recipe"].max_steps)
        if self.is_passive:
            return max_steps
        return round(getattr(self, "start_frac", 0.0) * max_steps)

    def last_step(self, parts: Mapping[str, Any]) -> int:
        """The step after which a run with this remedy ends."""
        return int(parts["recipe"].max_steps)

    def needs(self) -> tuple[str, ...]:
        """Dotted names of the parts of the configuration that the remedy requires."""
        return ()

    def replaces(self) -> tuple[str, ...]:
        """Dotted names of fields whose values the remedy replaces during the run.

        Unlike those of `config_overrides` they keep their values in the configuration. It is an
        error if two remedies replace or set the same field.
        """
        return ()

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields that the remedy sets outside its own section, by dotted name.

        It is an error if two remedies set the same field, or if the user typed that field.

        Args:
            parts: the sections of the configuration before any remedy has changed them.
        """
        return {}

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        """The reason why the remedy has no effect in this configuration; None if it has one.

        Default: a remedy has no effect if its overrides equal the values already configured, or if
        it starts at the end of the run.
        """
        values = self.config_overrides(parts)
        if values and all(value_at(parts, field) == value for field, value in values.items()):
            return ", ".join(f"{field} is {value} already" for field, value in values.items())
        if getattr(self, "start_frac", 0.0) == 1.0:
            return "start_frac is 1, the end of the run"
        return None

    def check(self, parts: Mapping[str, Any]) -> None:
        """Raises ValueError if the remedy does not fit the rest of the configuration.

        The message begins with the remedy's field, or is an InputError that begins with another's.

        Args:
            parts: the sections of the configuration, with all overrides applied.
        """

    def num_weight_copies(self, device: str) -> int:
        """Copies of the weights that it holds in the memory of the device that trains, cpu or cuda.

        AdamW's two moments count as two copies. Default: one for a remedy that keeps an average.
        """
        return int(self.keeps_average)

    def lr_factor(self, step: int, max_steps: int) -> float:
        """A factor on the scheduled learning rate.

        Args:
            step: the number of optimizer steps already made.
            max_steps: the length of the run.
        """
        return 1.0

    def replace_optimizer(
        self, optimizer: torch.optim.Optimizer, module: nn.Module
    ) -> torch.optim.Optimizer:
        """The optimizer to train with in place of another one; default: the other one.

        Args:
            optimizer: AdamW with the recipe's settings and groups.
            module: the module whose parameters it updates.
        """
        return optimizer

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """The callbacks that carry the remedy out; they must work with any LightningModule."""
        return []


def check_frac(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a fraction of a run, 0 and 1 included."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be a fraction of the run, from 0 to 1")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: must be above 0 and finite")
