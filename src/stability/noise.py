"""Gaussian noise on the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from src.common.random_streams import stream_seed
from src.stability.base import RemedyConfig, RunFacts, check_frac, check_positive
from src.stability.gradient_remedy import GradientRemedy

if TYPE_CHECKING:
    import lightning.pytorch as pl

SCALES = ("absolute", "gradient_rms", "clip_norm")


@dataclass(kw_only=True)
class NoiseConfig(RemedyConfig):
    """Adds noise to every gradient before clipping (Neelakantan et al., arXiv 1511.06807).

    Option 5 of the write-up. Taken literally (scale=absolute) the noise has a norm of
    std * sqrt(number of parameters): 30 for 916M parameters. Clipping then shrinks the signal
    thirtyfold. The other scales avoid this.
    """

    draws: ClassVar[bool] = True

    std: float
    """Standard deviation, in units of `scale`; above 0."""
    scale: str
    """absolute: 1; gradient_rms: the root mean square of the entries of each tensor; clip_norm: the
    total norm of the noise is std times recipe.clip_norm."""
    start_frac: float
    """Fraction of the run without noise; from 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("std", self.std)
        check_frac("start_frac", self.start_frac)
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale}: must be one of {', '.join(SCALES)}")

    def check(self, parts: Mapping[str, Any]) -> None:
        if self.scale == "clip_norm" and parts["recipe"].clip_norm is None:
            raise ValueError("scale=clip_norm: needs recipe.clip_norm, which is null")

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        repeat = (run.repeat,) if run.repeat else ()
        return [GradientNoise("noise", self, run, *repeat)]


class GradientNoise(GradientRemedy):
    """Draws from its own random stream, a new one each step, so that no other draw changes.

    Args:
        name: name of the remedy, which is also the purpose of its random stream.
        config: amount and start.
        run: facts about the run.
        index: further parts of the stream's key, such as the number of a repeat.
    """

    def __init__(self, name: str, config: NoiseConfig, run: RunFacts, *index: int) -> None:
        super().__init__(run)
        self.name, self.config, self.index = name, config, index
        self.start_step = run.step_at(config.start_frac)

    def change(self, gradients: list[Tensor], *, norm: Tensor, step: int) -> bool:
        if step <= self.start_step:
            return False
        seed = stream_seed(self.run.seed, self.name, *self.index, step)
        generator = torch.Generator(gradients[0].device).manual_seed(seed)
        num_entries = sum(gradient.numel() for gradient in gradients)
        total = torch.zeros((), device=gradients[0].device)
        for gradient in gradients:
            noise = torch.randn(
                gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype
            )
            noise *= self._std(gradient, num_entries)
            total += noise.square().sum()
            gradient += noise
        self.figures["norm"] = total.sqrt()
        return True

    def _std(self, gradient: Tensor, num_entries: int) -> Tensor | float:
        if self.config.scale == "gradient_rms":
            return self.config.std * gradient.square().mean().sqrt()
        if self.config.scale == "clip_norm":
            assert self.run.clip_norm is not None
            return self.config.std * self.run.clip_norm / math.sqrt(num_entries)
        return self.config.std
