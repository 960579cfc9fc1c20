"""Shows one line per job while a wave runs: state, step, loss, time left."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from src.common import terminal
from src.common.record import verdict
from src.common.run_folder import read_json
from src.config.variant_name import short_names
from src.sweep.plan import Cell

REFRESH_SECONDS = 1.0
TAIL_BYTES = 8192


class Monitor:
    """Watches the files that jobs write, which works with every launcher.

    Args:
        cells: the runs of the wave.
        status_file: returns the status file of a run's job.
        board: the display, shared by all waves.
        n_jobs: number of jobs at a time, for the estimate of the time left.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        status_file: Callable[[Cell], Path],
        *,
        board: terminal.JobBoard,
        n_jobs: int,
    ) -> None:
        self.cells, self.status_file = cells, status_file
        self._board, self.n_jobs = board, n_jobs
        self._names = short_names([cell.config.variant_name for cell in cells])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sweep-monitor", daemon=True)
        self._seen: dict[Path, str] = {}
        self._seconds: list[float] = []

    def __enter__(self) -> "Monitor":
        self._board.open()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._board.close()

    def _follow(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            self._look()

    def _look(self) -> None:
        running = {}
        for cell in self.cells:
            status = read_json(self.status_file(cell))
            if status is None:
                continue
            state = status["state"]
            name = f"{self._names[cell.config.variant_name]}/{cell.folder.name}"
            if state == "running":
                running[name] = _progress(cell, status)
            elif self._seen.get(cell.folder) != state:
                self._seen[cell.folder] = state
                seconds = status.get("ended", 0.0) - status.get("started", status.get("ended", 0.0))
                self._seconds.append(seconds)
                self._board.ended(name, state, status["reason"] or _verdict(cell), seconds)
        self._board.show(running, left=self._time_left())

    def _time_left(self) -> float | None:
        """Estimated seconds left, from the mean of this wave's jobs that have ended."""
        if not self._seconds:
            return None
        remaining = self._board.total - self._board.num_ended
        return remaining / self.n_jobs * sum(self._seconds) / len(self._seconds)


def _verdict(cell: Cell) -> str:
    """What went wrong in a run; empty if nothing did."""
    record = read_json(cell.folder / "record.json")
    return "" if record is None else verdict(record) or ""


def _progress(cell: Cell, status: dict[str, Any]) -> terminal.JobProgress:
    line = _last_metrics(cell.folder / "metrics.jsonl")
    first = cell.first_step
    step, total = int(line.get("step", first)), cell.config.last_step
    seconds = max(0.0, time.time() - status["started"])
    done = step - first
    left = seconds / done * (total - step) if done > 0 else None
    return terminal.JobProgress(step=step, total=total, loss=line.get("train/loss"), left=left)


def _last_metrics(file: Path) -> dict[str, float]:
    """The last complete line of metrics.jsonl with a loss; reads only the end of the file."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines[:-1]):
        try:
            found: dict[str, float] = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in found:
            return found
    return {}
