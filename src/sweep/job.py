"""One job of a sweep: a worker of Hydra's launcher, and the training process that it starts.

The worker only waits: for the end of the training process, for the time-out, for the sweep's
request to stop, or for the sweep's death. So a training process that raises, calls sys.exit or is
killed cannot harm the worker. It is forked from a server that has done nothing but the imports,
which take seconds.
"""

import contextlib
import gc
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
"""How long a process may take to end with a checkpoint before it is killed."""

MOVED = ".moved"
"""Suffix of the marker that is written after rerun=true has moved the earlier run aside."""

BUSY = "another process is training it"

IMPORTS = (
    "src.sweep.server",
    "src.cli.command_line",
    # A command imports these two only when it needs them.
    "src.cli.hydra_errors",
    "src.config.compose",
    "src.run.lifecycle",
    # For the curves on an incident's page.
    "src.common.chart_library",
    "vl_convert",
)
"""Modules that training processes need; the fork server imports them once, in this order."""

MLFLOW_IMPORTS = ("mlflow", "mlflow.store.tracking.sqlalchemy_store", "alembic.command")
"""Modules that MLflow needs to write to a database. A run would import them in a thread of its own,
beside its first steps, which then take seconds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know. It is passed in a file, which works with every launcher."""

    folder: str
    """The run folder."""
    arguments: list[str]
    """The arguments of src.train."""
    start: list[Any] | None
    """Run folder, step and key of the baseline's state that the run can start from; None: none."""
    rerun: bool
    """Whether to move an earlier run aside and train it anew."""
    timeout: float | None
    """Seconds after which the job is ended; None: never."""
    stop_file: str
    """Appears when the sweep is to end; holds the name of the signal that ends its jobs."""
    status_file: str
    """Where the worker writes the state of the job."""
    owner: list[Any] | None
    """Host and process id of the sweep; the job ends if that process ends. None on a cluster, where
    the job continues."""
    mlflow: bool
    """Whether runs are sent to MLflow; if so, it is imported in advance."""

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def run_job(config: DictConfig) -> str:
    """The function that Hydra's launcher calls; returns the state of the job.

    Args:
        config: conf/sweep.yaml, whose field `job` names the file of a `Job`.
    """
    job = Job(**json.loads(Path(config.job).read_text(encoding="utf-8")))
    # Ctrl-C reaches every process of the terminal, but only the sweep decides what it means. With
    # one job at a time the launcher runs this in the sweep's own process, which must not ignore it.
    if job.owner is None or os.getpid() != job.owner[1]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return JobProcess(job).run()


class JobProcess:
    """The training process of a job, and the status file that tells the sweep its state."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(job.folder)
        self.log_begin = 0
        self.began = time.monotonic()
        self.status: dict[str, Any] = {"state": "waiting", "reason": "", "pid": None}
        self.preemption = Preemption() if job.owner is None else None

    def run(self) -> str:
        """Trains; returns finished, failed, killed, timed out, stopped or busy.

        Does not return if the job is preempted.
        """
        if Path(self.job.stop_file).exists() or self._is_orphan():
            return self._end("stopped", "the sweep ended before the run began")
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
        # Otherwise torch.cuda.is_available() initialises CUDA, which does not survive a fork.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # Forced, because joblib's workers have already set a start method of their own.
        multiprocessing.set_start_method("forkserver", force=True)
        more = MLFLOW_IMPORTS if self.job.mlflow else ()
        multiprocessing.set_forkserver_preload([*IMPORTS, *more])
        process = multiprocessing.Process(target=train, args=(arguments, str(log)))
        with nullcontext() if self.preemption is None else self.preemption.noting():
            process.start()
        # If the sweep dies, this worker must not exit before its training process has ended.
        with finishing:
            self._write_status("running", "", pid=process.pid)
            end_reason = self._wait(process)
            assert process.exitcode is not None
            state = self._end(*self._result(process.exitcode, end_reason))
        if self.preemption is not None and state == "waiting":
            self.preemption.obey()
        return state

    def _arguments(self) -> list[str]:
        """The arguments of src.train, with fork= if the run is new and its start state is valid."""
        arguments = list(self.job.arguments)
        # Only once per sweep, because Slurm may start the same job several times.
        moved = Path(self.job.status_file).with_suffix(MOVED)
        if self.job.rerun and not moved.exists():
            RunFolder(self.folder).move_aside()
            moved.touch()
        if self.job.start is None or (self.folder / "config.yaml").exists():
            return arguments
        source, step, key = self.job.start
        if Fork(source=Path(source), step=step).key == key:
            return [*arguments, f"fork={source}@{step}"]
        self.status["reason"] = (
            f"started from step 0, because {source} has no state of this code at step {step}"
        )
        return arguments

    def _wait(self, process: BaseProcess) -> str | None:
        """Waits until the process has ended.

        Returns:
            Why this worker ended it: stopped, timed out or preempted. None if it ended by itself.
        """
        end_reason: str | None = None
        deadline = 0.0
        begin = time.monotonic()
        while True:
            process.join(POLL_SECONDS)
            if process.exitcode is not None:
                # Slurm's signal may reach the training process before this worker notes it.
                return "preempted" if end_reason is None and self._is_preempted() else end_reason
            now = time.monotonic()
            if end_reason is None:
                end_reason = self._reason_to_end(now - begin)
                if end_reason is not None:
                    deadline = now + self._grace_seconds(end_reason)
                    _signal(process, self._signal_number())
            elif now > deadline or self._must_end_now():
                _signal(process, signal.SIGKILL)

    def _reason_to_end(self, seconds: float) -> str | None:
        if Path(self.job.stop_file).exists():
            return "stopped"
        if self.job.timeout is not None and seconds > self.job.timeout:
            return "timed out"
        if self._is_preempted():
            return "preempted"
        return "stopped" if self._is_orphan() else None

    def _is_orphan(self) -> bool:
        """Whether the sweep's process has ended."""
        if self.job.owner is None:
            return False
        host, pid = self.job.owner
        return host == socket.gethostname() and not is_alive(pid)

    def _is_preempted(self) -> bool:
        return self.preemption is not None and self.preemption.signal is not None

    def _grace_seconds(self, end_reason: str) -> float:
        """How long the process may take to end with a checkpoint before it is killed."""
        if end_reason == "preempted":
            # Slurm itself kills the job when its own grace time is over.
            return math.inf
        if end_reason != "timed out" or self.job.timeout is None:
            return MAX_GRACE_SECONDS
        # Only a tenth of the time-out, because a job that overran it may hang.
        return min(MAX_GRACE_SECONDS, max(MIN_GRACE_SECONDS, self.job.timeout / 10))

    def _signal_number(self) -> int:
        """The signal that the sweep received, so that the run ends with the same exit code."""
        try:
            return signal.Signals[Path(self.job.stop_file).read_text(encoding="utf-8").strip()]
        except (OSError, KeyError):
            return signal.SIGTERM

    def _must_end_now(self) -> bool:
        return Path(self.job.stop_file).with_suffix(".now").exists()

    def _result(self, code: int, end_reason: str | None) -> tuple[str, str]:
        """State and reason of a job whose process has ended with this exit code."""
        if code == 0:
            record = read_json(self.folder / "record.json") or {}
            if record.get("status") == "finished":
                return "finished", self.status["reason"]
        if end_reason == "timed out":
            return "timed out", f"took longer than timeout={self.job.timeout}"
        if end_reason == "stopped":
            return "stopped", "the same command continues it"
        if end_reason == "preempted":
            return "waiting", "preempted; Slurm starts it again"
        if code < 0:
            return "killed", f"by signal {signal.Signals(-code).name}"
        line = _last_error(self.folder / "train.log", begin=self.log_begin)
        if code == 2 and "is being written by another run" in line:
            return "busy", BUSY
        return "failed", f"exit code {code}: {line}"

    def _write_status(self, state: str, reason: str, **more: Any) -> None:
        self.status |= {"state": state, "reason": reason or self.status["reason"], **more}
        write_json(Path(self.job.status_file), self.status)

    def _end(self, state: str, reason: str) -> str:
        # From the monotonic clock, so that the end is never before the start if the clock is set.
        ended = self.status.get("started", time.time()) + time.monotonic() - self.began
        self._write_status(state, reason, pid=None, ended=ended)
        return state


def train(arguments: list[str], log: str) -> None:
    """The training process: runs src.train with all its output in the log."""
    # A session of its own, so that Ctrl-C in the terminal does not reach it, only the worker's
    # signals.
    os.setsid()
    # What the server has imported is never collected, so that its pages stay shared.
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_signals()
    threading.Thread(target=_end_with_worker, name="worker-watch", daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    from src.cli import command_line
    from src.run.lifecycle import run

    sys.exit(command_line.main("train", run, usage="", is_checked=True, argv=arguments))


def _end_with_worker() -> None:
    """If the worker dies, nobody waits for this process any more: it ends with a checkpoint."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    connection.wait([worker.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _signal(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        # The process has ended, or has not yet called setsid.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _last_error(log: Path, *, begin: int) -> str:
    """The last error line of a log after `begin` bytes; without one, its last non-blank line."""
    with log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return next(iter(errors or lines), "no output")[:300]
