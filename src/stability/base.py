"""What a remedy is: overrides of the recipe, a factor on the rate, callbacks, or several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl

from src.common.nested_values import value_at

ROUTER = "ffn.router"
"""The part of a config that options on the router need."""

Role = Literal["remedy", "aa_control", "positive_control"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a remedy may know of the run."""

    max_steps: int
    """Optimizer steps; fractions of the run refer to it."""
    log_every: int
    """Steps between logged lines."""
    seed: int
    repeat: int
    clip_norm: float | None
    """The bound on the gradient norm that is in force."""

    def step_at(self, frac: float) -> int:
        """The number of the step that ends a share of the run."""
        return round(frac * self.max_steps)


@dataclass(kw_only=True)
class RemedyConfig:
    """One stability option. Absent from the config, it is absent from the run, bitwise."""

    role: ClassVar[Role] = "remedy"
    """What the remedy is for in a study. An A/A control differs from the baseline by chance alone;
    a positive control is known to work, so a study that does not find it cannot rank the others."""
    is_passive: ClassVar[bool] = False
    """Whether training stays bitwise the baseline's, so that a baseline run can carry it."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers, so that another `repeat` is another run."""
    ends_early: ClassVar[bool] = False
    """Whether it ends training on purpose, so that a report does not count the end as a failure."""
    keeps_average: ClassVar[bool] = False
    """Whether it holds a second copy of the weights, which counts as memory."""
    evaluated_as: ClassVar[str | None] = None
    """The evaluation weights by which a run is judged: its loss is `val_<evaluated_as>/loss`. None:
    the trained weights, `val/loss`."""

    @classmethod
    def roles(cls) -> dict[str, Any]:
        """What reports must know of the remedy; record.json holds it, so no report knows names."""
        names = ("role", "evaluated_as", "ends_early", "keeps_average")
        return {name: getattr(cls, name) for name in names}

    def start_step(self, parts: Mapping[str, Any]) -> int:
        """Number of steps that are bitwise the baseline's before the remedy changes anything.

        The default: those before `start_frac` where there is such a field, else none.

        Args:
            parts: the sections of the configuration.
        """
        max_steps = int(parts["recipe"].max_steps)
        if self.is_passive:
            return max_steps
        return round(getattr(self, "start_frac", 0.0) * max_steps)

    def last_step(self, parts: Mapping[str, Any]) -> int:
        """The step after which a run with this option ends."""
        return int(parts["recipe"].max_steps)

    def needs(self) -> tuple[str, ...]:
        """Parts of the configuration, by dotted name, without which the option means nothing."""
        return ()

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Fields outside its own that the remedy sets, by dotted name.

        It is an error if two remedies set one field, or if the user typed that field.

        Args:
            parts: the sections of the configuration, unchanged by any option.
        """
        return {}

    def no_op(self, parts: Mapping[str, Any]) -> str | None:
        """Why the option changes nothing in this configuration; None where it does.

        By default: a remedy whose overrides are the values that the configuration has already is
        its own baseline.
        """
        values = self.config_overrides(parts)
        if values and all(value_at(parts, field) == value for field, value in values.items()):
            return ", ".join(f"{field} is {value} already" for field, value in values.items())
        if getattr(self, "start_frac", 0.0) == 1.0:
            return "start_frac is 1, the end of the run"
        return None

    def check(self, parts: Mapping[str, Any]) -> None:
        """Raises ValueError where the option does not go with the rest of the configuration.

        Args:
            parts: the sections of the configuration, with all overrides applied.
        """

    def lr_factor(self, step: int, max_steps: int) -> float:
        """A further factor on the learning rate of the optimizer step after `step` others."""
        return 1.0

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """Callbacks that carry it out; they serve any LightningModule."""
        return []


def check_frac(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a share of a run, 0 and 1 included."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be from 0 to 1, a share of the run")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: must be above 0 and finite")
