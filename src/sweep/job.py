"""One job of a sweep: a training process of its own, whatever launcher brought it here.

A worker of Hydra's launcher only waits: for the end of the process, for the time-out, for the
sweep's wish to stop, for the sweep's death. A training process that raises, calls sys.exit or is
killed takes nothing with it. It is forked from a server that has done the imports, which take
seconds, and nothing else.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.common.errors import InputError
from src.common.orphans import finishing
from src.common.run_folder import RunFolder, read_json, write_json
from src.config.fork import Fork
from src.sweep.cluster import Preemption, take_signals

POLL_SECONDS = 0.2
MIN_GRACE_SECONDS, MAX_GRACE_SECONDS = 5.0, 60.0
"""Between the wish that a process ends in order, with a checkpoint, and its end by force."""

MOVED = ".moved"
"""Suffix of what says that the run before was moved aside."""

BUSY = "another sweep has it"

IMPORTS = (
    "src.sweep.server",
    "src.cli.command_line",
    "src.run.lifecycle",
    "matplotlib.backends.backend_svg",
)
"""What every training process needs; imported once a worker, in this order."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told; a file, so that it reaches every launcher's workers."""

    folder: str
    """The run folder."""
    arguments: list[str]
    """Of src.train."""
    start: list[Any] | None
    """Baseline's folder, step and key of the state from which the run can begin."""
    rerun: bool
    timeout: float | None
    stop_file: str
    """Appears when the sweep wants to end; holds the name of the signal that ends its jobs."""
    status_file: str
    owner: list[Any] | None
    """Host and process of the sweep, without which the job ends; None on a cluster, where it goes
    on."""
    mlflow: bool
    """Whether runs are mirrored, so that MLflow is worth importing beforehand."""

    def write(self, path: Path) -> None:
        """To be read by `run_job`."""
        write_json(path, asdict(self))


def run_job(config: DictConfig) -> str:
    """The function that Hydra's launcher calls with conf/sweep.yaml; returns the state."""
    job = Job(**json.loads(Path(config.job).read_text(encoding="utf-8")))
    if job.owner is None or os.getpid() != job.owner[1]:
        # Ctrl-C reaches every process of the terminal; the sweep alone decides what it means. A
        # launcher of one job at a time runs this in the sweep's own process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Child(job).run()


class Child:
    """A training process and the file that tells the sweep how it fares."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(job.folder)
        self.log_begin = 0
        self.began = time.monotonic()
        self.status: dict[str, Any] = {"state": "waiting", "reason": "", "pid": None}
        self.preemption = Preemption() if job.owner is None else None

    def run(self) -> str:
        """Trains; returns finished, failed, killed, timed out, stopped or busy.

        A job that is preempted does not return.
        """
        if Path(self.job.stop_file).exists() or self._is_orphan():
            return self._end("stopped", "the sweep ended before it began")
        try:
            arguments = self._arguments()
            self.folder.mkdir(parents=True, exist_ok=True)
        except InputError as error:
            busy = "is being written by another run" in str(error)
            return self._end("busy" if busy else "failed", BUSY if busy else str(error))
        except OSError as error:
            return self._end("failed", str(error))
        self.status["started"], self.began = time.time(), time.monotonic()
        log = self.folder / "train.log"
        self.log_begin = log.stat().st_size if log.exists() else 0
        # Whether a GPU is there must not be asked in a way that a fork does not survive.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # By force, because joblib's workers have a method of their own that others do not know.
        multiprocessing.set_start_method("forkserver", force=True)
        multiprocessing.set_forkserver_preload([*IMPORTS, *(["mlflow"] if self.job.mlflow else [])])
        process = multiprocessing.Process(target=train, args=(arguments, str(log)))
        with nullcontext() if self.preemption is None else self.preemption.noting():
            process.start()
        # A worker whose sweep is gone sees its training process off first.
        with finishing:
            self._tell("running", "", pid=process.pid)
            wish = self._wait(process)
            assert process.exitcode is not None
            state = self._end(*self._verdict(process.exitcode, wish))
        if self.preemption is not None and state == "waiting":
            self.preemption.obey()
        return state

    def _arguments(self) -> list[str]:
        """Begins from the baseline's state where the run is new and the state the right one."""
        arguments = list(self.job.arguments)
        # Once a sweep, however often the job is started.
        moved = Path(self.job.status_file).with_suffix(MOVED)
        if self.job.rerun and not moved.exists():
            RunFolder(self.folder).move_aside()
            moved.touch()
        if self.job.start is None or (self.folder / "config.yaml").exists():
            return arguments
        source, step, key = self.job.start
        if Fork(source=Path(source), step=step).key == key:
            return [*arguments, f"fork={source}@{step}"]
        self.status["reason"] = f"no state of this code at step {step} in {source}: from nothing"
        return arguments

    def _wait(self, process: BaseProcess) -> str | None:
        """Waits for the end; returns why it was brought about, None where it came of itself."""
        wish: str | None = None
        deadline = 0.0
        begin = time.monotonic()
        while True:
            process.join(POLL_SECONDS)
            if process.exitcode is not None:
                # Slurm's signals reach it as well, and perhaps sooner.
                return "preempted" if wish is None and self._is_preempted() else wish
            now = time.monotonic()
            if wish is None:
                wish = self._wish(now - begin)
                if wish is not None:
                    deadline = now + self._grace(wish)
                    _signal(process, self._signal_number())
            elif now > deadline or self._hurry():
                _signal(process, signal.SIGKILL)

    def _wish(self, seconds: float) -> str | None:
        if Path(self.job.stop_file).exists():
            return "stopped"
        if self.job.timeout is not None and seconds > self.job.timeout:
            return "timed out"
        if self._is_preempted():
            return "preempted"
        return "stopped" if self._is_orphan() else None

    def _is_orphan(self) -> bool:
        """Whether the sweep is gone."""
        if self.job.owner is None:
            return False
        host, pid = self.job.owner
        return host == socket.gethostname() and not is_alive(pid)

    def _is_preempted(self) -> bool:
        return self.preemption is not None and self.preemption.signal is not None

    def _grace(self, wish: str) -> float:
        """A tenth of the time-out for a job that has overrun it, which may hang."""
        if wish == "preempted":
            # Slurm itself ends it when its patience is over.
            return math.inf
        if wish != "timed out" or self.job.timeout is None:
            return MAX_GRACE_SECONDS
        return min(MAX_GRACE_SECONDS, max(MIN_GRACE_SECONDS, self.job.timeout / 10))

    def _signal_number(self) -> int:
        """What the sweep itself was sent, so that the run ends with the same exit code."""
        try:
            return signal.Signals[Path(self.job.stop_file).read_text(encoding="utf-8").strip()]
        except (OSError, KeyError):
            return signal.SIGTERM

    def _hurry(self) -> bool:
        return Path(self.job.stop_file).with_suffix(".now").exists()

    def _verdict(self, code: int, wish: str | None) -> tuple[str, str]:
        if code == 0:
            record = read_json(self.folder / "record.json") or {}
            if record.get("status") == "finished":
                return "finished", self.status["reason"]
        if wish == "timed out":
            return "timed out", f"took longer than timeout={self.job.timeout}"
        if wish == "stopped":
            return "stopped", "it continues where it was"
        if wish == "preempted":
            return "waiting", "preempted; Slurm starts it again"
        if code < 0:
            return "killed", f"by signal {signal.Signals(-code).name}"
        line = _reason(self.folder / "train.log", begin=self.log_begin)
        if code == 2 and "is being written by another run" in line:
            return "busy", BUSY
        return "failed", f"exit code {code}: {line}"

    def _tell(self, state: str, reason: str, **more: Any) -> None:
        self.status |= {"state": state, "reason": reason or self.status["reason"], **more}
        write_json(Path(self.job.status_file), self.status)

    def _end(self, state: str, reason: str) -> str:
        # Later than its beginning, wherever the clock of the day has jumped in between.
        ended = self.status.get("started", time.time()) + time.monotonic() - self.began
        self._tell(state, reason, pid=None, ended=ended)
        return state


def train(arguments: list[str], log: str) -> None:
    """What the training process does: src.train, with all its output in the log."""
    # A group of its own: no Ctrl-C of the terminal reaches it, only what the worker sends.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_signals()
    threading.Thread(target=_end_with_worker, name="worker-watch", daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    from src.cli import command_line
    from src.run.lifecycle import run

    sys.exit(command_line.main("train", run, usage="", argv=arguments))


def _end_with_worker() -> None:
    """Where the worker is gone nobody waits for this process: it ends in order."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    connection.wait([worker.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _signal(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        # Gone, or so young that it has no group of its own yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _reason(log: Path, *, begin: int) -> str:
    """The last error that a log names after so many bytes, else its last line not blank."""
    with log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return next(iter(errors or lines), "no output")[:300]
