"""The null arm: what differs from the baseline by chance alone."""

from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl

from src.stability.base import Role, RunFacts
from src.stability.noise import GradientNoise, NoiseConfig


@dataclass(kw_only=True)
class ShakenConfig(NoiseConfig):
    """Noise too small to treat anything: the run diverges from its baseline by chaos.

    The yardstick of every other arm. It starts where the arm it is compared with starts, and each
    `repeat` shakes anew.
    """

    name: ClassVar[str] = "shaken"
    role: ClassVar[Role] = "aa_control"

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        """See RemedyConfig."""
        return [GradientNoise(self.name, self, run, run.repeat)]


@dataclass(kw_only=True)
class ShakenFullConfig(ShakenConfig):
    """The same from the start, for arms that act from the start."""

    name: ClassVar[str] = "shaken_full"
