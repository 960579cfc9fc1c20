"""Timings besides training steps: the whole run, decoding, the start of a run, and growth."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import mean, median

from src.lab.benchmark.contestants import OURS, TRANSFORMERS, is_there
from src.lab.benchmark.race import Worker, process_environment
from src.lab.benchmark.shapes import Case
from src.model.architecture import ModelParts
from src.model.ffn.moe import MoEConfig

RUN = "whole run"
IMPORTS = "imports"

LOOP_STEPS = 40
"""Steps of a turn; the fewest in which every instrument measures at its default interval."""

GROWTH_STEPS = 5

NUM_TOKENS = 128
"""Tokens decoded in a turn."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measurement of one contestant."""

    case: Case
    task: str
    name: str
    unit: str
    value: float
    least: float
    greatest: float
    """Least and greatest over rounds."""


def measure_loop(case: Case, *, rounds: int) -> list[Timing]:
    """Milliseconds per step, mean over rounds, of the bare step and of `python -m src.train`.

    A turn of the run includes data, guard, instruments, clipping, tracking, the progress bar and a
    checkpoint every 100 steps.
    """
    turns: dict[str, list[float]] = {OURS: [], RUN: []}
    with _worker(OURS, case) as bare, _run(case) as run:
        for number in range(rounds + 1):
            for worker in (bare, run) if number % 2 == 0 else (run, bare):
                seconds = worker.ask(do="steps", count=LOOP_STEPS)["seconds"]
                # Not counted, because tracking starts in the first turn.
                if number:
                    turns[worker.name].append(1000 * sum(seconds) / LOOP_STEPS)
    return [_timing(case, "loop", name, "ms per step", turns[name], mean) for name in turns]


def measure_decode(case: Case, *, rounds: int) -> list[Timing]:
    """Tokens per second of greedy decoding from a prompt of 16 tokens, median over rounds."""
    names = [OURS, *([TRANSFORMERS] if is_there(TRANSFORMERS) else [])]
    turns: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(name, case)) for name in names]
        for number in range(rounds + 1):
            for worker in workers:
                seconds = worker.ask(do="decode", count=NUM_TOKENS)["seconds"]
                # The first turn warms up.
                if number:
                    turns[worker.name].append(NUM_TOKENS / seconds)
    return [_timing(case, "decode", name, "tokens/s", turns[name], median) for name in names]


def measure_start(case: Case, *, rounds: int) -> list[Timing]:
    """Seconds to the end of a run's first step, and seconds to import torch and lightning."""
    turns: dict[str, list[float]] = {IMPORTS: [], RUN: []}
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import torch, lightning.pytorch"],
            check=True,
            timeout=300,
            env=process_environment(case),
        )
        turns[IMPORTS].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with _run(case):
            turns[RUN].append(time.perf_counter() - begin)
    return [_timing(case, "start", name, "s", turns[name], median) for name in turns]


def measure_growth(case: Case, *, rounds: int) -> list[Timing]:
    """Tokens per second of this project's step, also with twice the layers or more experts."""
    parts = case.config().architecture
    assert isinstance(parts, ModelParts)
    layers = parts.model.num_layers
    grown: dict[str, tuple[str, ...]] = {
        f"{layers} layers": (),
        f"{2 * layers} layers": (f"model.num_layers={2 * layers}",),
    }
    if isinstance(parts.ffn, MoEConfig):
        experts = 4 * parts.ffn.num_routed
        grown[f"{experts} experts"] = (f"ffn.num_routed={experts}",)
    turns: dict[str, list[float]] = {name: [] for name in grown}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(OURS, replace(case, more=more)))
            for name, more in grown.items()
        }
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds = worker.ask(do="steps", count=GROWTH_STEPS)["seconds"]
                turns[name].append(case.tokens / median(seconds))
    return [_timing(case, "growth", name, "tokens/s", turns[name], median) for name in grown]


TASKS: dict[str, Callable[..., list[Timing]]] = {
    "loop": measure_loop,
    "decode": measure_decode,
    "start": measure_start,
    "growth": measure_growth,
}


def _worker(name: str, case: Case) -> Worker:
    return Worker(name, case, warmup=3, num_params=1)


@contextmanager
def _run(case: Case) -> Iterator[Worker]:
    """A run that has taken its first step, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        module = "src.lab.benchmark.paced_run"
        with Worker(RUN, case, warmup=1, num_params=1, module=module, folder=folder) as worker:
            yield worker


def _timing(
    case: Case,
    task: str,
    name: str,
    unit: str,
    turns: Sequence[float],
    middle: Callable[[Sequence[float]], float],
) -> Timing:
    return Timing(
        case=case,
        task=task,
        name=name,
        unit=unit,
        value=middle(turns),
        least=min(turns),
        greatest=max(turns),
    )
