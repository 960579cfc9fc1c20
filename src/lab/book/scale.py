"""The cost of a study on other machines: its runs, one per device, at a given speed."""

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.config.compose import compose
from src.config.memory_estimate import Memory, predict_memory, run_hours, vocab_size
from src.config.run_config import RunConfig
from src.model.size import Size
from src.study.analysis.frames import own_steps
from src.study.read.collect import Study

PRESET = "preset=writeup"

SPEED_FILE = "speed.jsonl"
"""Lines that `python -m src.lab bench` wrote on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model size with the write-up's recipe, as `describe` computes it."""

    config: RunConfig
    size: Size
    memory: Memory

    def hours(self, tokens_per_second: float) -> float:
        """Hours of one run on one device."""
        return run_hours(self.config, tokens_per_second=tokens_per_second)

    def tokens_per_second(self, mfu: float, *, flops: float) -> float:
        """Speed at a given MFU, the share of a device's peak FLOP/s."""
        return mfu * flops / self.size.flops_per_token


@lru_cache
def described(model: str, *fields: str) -> Model:
    """A size of conf/model with the published router; further fields as on the command line."""
    # The machine does not matter: nothing is trained.
    given = [PRESET, f"model={model}", "ffn=moe_writeup", "trainer=cpu", *fields]
    config = compose("describe", given)
    words = vocab_size(config)
    memory = predict_memory(config, vocab_size=words)
    assert memory is not None
    return Model(config=config, size=config.architecture.measure(vocab_size=words), memory=memory)


def waves(study: Study) -> list[list[float]]:
    """The runs of a study in two waves, each as the share of a whole run that it trains itself.

    Runs that others start from come first, as in a sweep on a cluster.
    """
    begun = {run.baseline for run in study.runs if own_steps(run) < run.steps}
    first: list[float] = []
    rest: list[float] = []
    for run in study.runs:
        wave = first if run.variant in begun else rest
        wave.append(own_steps(run) / run.max_steps)
    return [first, rest]


def num_states(study: Study) -> int:
    """The number of saved states in the middle of a run, from which other runs start."""
    starts = {(run.seed, run.steps - own_steps(run)) for run in study.runs}
    return sum(step > 0 for _, step in starts)


def makespan(jobs: Sequence[Sequence[float]], *, num_devices: int) -> float:
    """The end of the last job: wave after wave, each job on the first free device."""
    end = 0.0
    for wave in jobs:
        free = [end] * num_devices
        for job in wave:
            heapq.heappush(free, heapq.heappop(free) + job)
        end = max(free)
    return end


def measured(folder: Path, *, shape: str) -> list[dict[str, Any]]:
    """Measured speeds of a step on GPUs, from a file in the page's folder; empty without it."""
    file = folder / "scale" / SPEED_FILE
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        line
        for line in lines
        if line["case"]["shape"] == shape and line["case"]["device"] == "cuda"
    ]
