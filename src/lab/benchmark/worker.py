"""A process that holds one contestant and runs its steps on command.

Commands arrive as JSON lines on standard input, and answers go to standard output; what libraries
print goes to stderr. A process of its own gives each contestant its own memory and allocator.
"""

import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.orphans import end_with

PEAK_SIZE = 1536
"""Rows of the square matrices whose product measures the machine's FLOPs."""


def main() -> int:
    """Runs the process until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    # The input ends with the parent too, but it is not read during a turn.
    end_with(spec["parent"])

    import torch

    from src.lab.benchmark.contestants import build
    from src.lab.benchmark.shapes import Case

    case = Case(**spec["case"])
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision("high" if case.device == "cuda" else "highest")
    begin = time.perf_counter()
    contestant = build(spec["name"], case, num_params=spec["num_params"])
    losses = [contestant.step() for _ in range(spec["warmup"])]
    ready = {
        "num_params": contestant.num_params,
        "losses": [None if loss is None else loss.item() for loss in losses],
        "start_seconds": time.perf_counter() - begin,
    }
    _send(answers, ready)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "steps":
            _send(answers, _timed(contestant.step, case.device, command["count"]))
        elif command["do"] == "decode":
            _send(answers, {"seconds": _seconds(contestant.decode, command["count"])})
        else:
            _send(answers, {"flops_a_second": _peak(case.device, case.dtype)})
    return 0


def _send(answers: Any, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _timed(step: Any, device: str, count: int) -> dict[str, Any]:
    """Seconds of each step, CPU time over wall time, and peak memory."""
    import torch

    seconds, begin_cpu, begin = [], time.process_time(), time.perf_counter()
    for _ in range(count):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - begin_cpu) / (time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    return {"seconds": seconds, "cpu": cpu, "peak_bytes": memory}


def _seconds(act: Any, count: int) -> float:
    begin = time.perf_counter()
    act(count)
    return time.perf_counter() - begin


def _peak_resident() -> int:
    """Peak resident memory of this process, in bytes.

    On Linux, VmHWM is used, because ru_maxrss starts with the parent's value.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak(device: str, dtype: Any) -> float:
    """FLOPs per second of a large matrix product in the case's dtype."""
    import torch

    size = PEAK_SIZE if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
