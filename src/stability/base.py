"""What a remedy is: a config whose claims change the recipe, or that builds callbacks, or both."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a remedy may know of the run."""

    max_steps: int
    """Optimizer steps; fractions of the run refer to it."""
    log_every: int
    """Steps between logged lines."""
    seed: int
    repeat: int


@dataclass(kw_only=True)
class RemedyConfig:
    """One stability option. Absent from the config, it is absent from the run, bitwise."""

    def claims(self) -> dict[str, Any]:
        """Fields outside its own that the option sets, by dotted name.

        Two options that claim one field, or a claim on a field that was typed, are an error.
        """
        return {}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """Callbacks that carry it out; they serve any LightningModule."""
        return []
