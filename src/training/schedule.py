"""Learning-rate schedules: pure functions of the step that return a factor on the peak rate.

`step` is the number of optimizer steps before this one, so it is 0 for the first. To add a
schedule, write a function here and a line in SCHEDULES.
"""

import math
from collections.abc import Callable

WSD_DECAY_FRAC = 0.2
"""Share of the run in which warm-up-stable-decay decays (arXiv 2404.06395, section 4)."""


def _warmup(step: int, *, warmup_steps: int) -> float:
    # step + 1, because a first step with a learning rate of 0 would change nothing.
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, *, begin: int, max_steps: int) -> float:
    """0 until `begin`, then linearly to 1 at `max_steps`."""
    return min(1.0, max(0.0, (step - begin) / max(1, max_steps - begin)))


def constant(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """1 after warm-up, as the write-up's text says."""
    return _warmup(step, warmup_steps=warmup_steps)


def linear(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Falls linearly to 0 at the end, as in the write-up's published code."""
    left = 1.0 - _progress(step, begin=warmup_steps, max_steps=max_steps)
    return _warmup(step, warmup_steps=warmup_steps) * left


def cosine(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Half a cosine wave to 0 at the end (arXiv 1608.03983, without restarts)."""
    progress = _progress(step, begin=warmup_steps, max_steps=max_steps)
    return _warmup(step, warmup_steps=warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): linear to 0 over the last fifth."""
    begin = max(warmup_steps, round((1 - WSD_DECAY_FRAC) * max_steps))
    left = 1.0 - _progress(step, begin=begin, max_steps=max_steps)
    return _warmup(step, warmup_steps=warmup_steps) * left


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}
