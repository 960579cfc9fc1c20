"""Times all contestants of a case in turn, each in its own process.

Interleaved turns spread other load of the machine over all contestants, so that ratios are reliable
even if absolute numbers are not.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

from src.lab.benchmark.contestants import FLOOR
from src.lab.benchmark.shapes import Case


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one contestant in one case."""

    case: Case
    name: str
    tokens_per_second: float
    """Median over rounds of each round's median step."""
    least: float
    greatest: float
    """Least and greatest over rounds."""
    num_params: int
    peak_bytes: int
    """Peak resident memory; on a GPU, peak allocated memory."""
    start_seconds: float
    """Time for building the model and for the warm-up steps."""
    cpu: float
    """CPU time over wall time, per thread; below 1, other processes used the cores."""
    losses: list[float | None]
    """Losses of the warm-up steps."""
    peak_flops: float
    """FLOPs per second of the machine in a large product, measured during the race."""


class Worker:
    """The process of a contestant."""

    def __init__(
        self,
        name: str,
        case: Case,
        *,
        warmup: int,
        num_params: int,
        module: str = "src.lab.benchmark.worker",
        **more: str,
    ) -> None:
        spec = {"name": name, "case": asdict(case), "warmup": warmup, "num_params": num_params}
        spec["parent"] = os.getpid()
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec | more)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=process_environment(case),
        )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:] or ["no output"]
            raise RuntimeError(f"{self.name}: ended with {self._process.wait()}: {last[0]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def process_environment(case: Case) -> dict[str, str]:
    """Environment variables of every process of a case."""
    threads = {n: str(case.threads) for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **threads}


def race(
    case: Case, names: Sequence[str], *, rounds: int, steps: int, warmup: int
) -> tuple[list[Result], list[str]]:
    """Times every contestant.

    Args:
        case: sizes, batch and device.
        names: contestants, of CONTESTANTS.
        rounds: number of rounds; in each, every contestant has a turn, in alternating order.
        steps: steps of a turn.
        warmup: steps before the first round.

    Returns:
        Results in the order of names, and an error line for each contestant that failed.
    """
    workers: list[Worker] = []
    failed = []
    try:
        # The floor's AdamW updates as many parameters as the model has.
        size = case.config().architecture.measure(vocab_size=case.sizes.vocab_size)
        # The floor comes last, because the last worker also measures the machine's peak FLOPs, and
        # the floor's memory is not reported for comparison.
        for name in sorted(names, key=lambda name: name == FLOOR):
            try:
                workers.append(Worker(name, case, warmup=warmup, num_params=size.params_total))
            except RuntimeError as error:
                failed.append(str(error))
        turns: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        peaks = []
        for number in range(rounds):
            peaks += [worker.ask(do="peak")["flops_a_second"] for worker in workers[-1:]]
            for worker in workers if number % 2 == 0 else workers[::-1]:
                turns[worker.name].append(worker.ask(do="steps", count=steps))
        results = [
            _result(case, worker, turns[worker.name], peak_flops=median(peaks))
            for worker in workers
        ]
    finally:
        for worker in workers:
            worker.close()
    return sorted(results, key=lambda result: names.index(result.name)), failed


def _result(
    case: Case, worker: Worker, turns: Sequence[dict[str, Any]], *, peak_flops: float
) -> Result:
    seconds = [median(turn["seconds"]) for turn in turns]
    return Result(
        case=case,
        name=worker.name,
        tokens_per_second=case.tokens / median(seconds),
        least=case.tokens / max(seconds),
        greatest=case.tokens / min(seconds),
        num_params=worker.facts["num_params"],
        peak_bytes=max(turn["peak_bytes"] for turn in turns),
        start_seconds=worker.facts["start_seconds"],
        cpu=median(turn["cpu"] for turn in turns) / case.threads,
        losses=worker.facts["losses"],
        peak_flops=peak_flops,
    )
