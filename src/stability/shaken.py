"""The A/A control: it differs from the baseline by chance alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from src.stability.base import Role, RunFacts
from src.stability.noise import GradientNoise, NoiseConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class ShakenConfig(NoiseConfig):
    """Gradient noise too small to be a treatment; chaos alone makes the run leave its baseline.

    A remedy counts as effective only if it differs from the baseline by more than this does. The
    control starts where the arm that it is compared with starts. Each `repeat` draws other noise.
    """

    name: ClassVar[str] = "shaken"
    role: ClassVar[Role] = "aa_control"

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [GradientNoise(self.name, self, run, run.repeat)]


@dataclass(kw_only=True)
class ShakenFullConfig(ShakenConfig):
    """The same from step 0 on, for arms that act from step 0 on."""

    name: ClassVar[str] = "shaken_full"
