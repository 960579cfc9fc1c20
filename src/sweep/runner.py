"""Runs a sweep: skips finished runs, trains the rest in waves, writes the report."""

import dataclasses
import hashlib
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import filelock

from src.cli import command_line
from src.common import terminal
from src.common.environment import code_digest
from src.common.errors import DamagedError, InputError
from src.common.run_folder import read_json
from src.common.tracking_address import default_uri
from src.config.hydra_compose import conf_folders
from src.run.resume import finished_record
from src.sweep.cluster import LAUNCHER, cancel_waiting, is_queued
from src.sweep.job import MAX_GRACE_SECONDS, MOVED, Job, is_alive
from src.sweep.launch import launch
from src.sweep.manifest import Manifest
from src.sweep.monitor import Monitor
from src.sweep.plan import Cell, Plan, make_plan
from src.sweep.preview import show_plan
from src.sweep.rounds import check_looks, rounds
from src.tracking.push_state import SWEEPS, is_held, writer_lock
from src.tracking.stale_runs import close_run
from src.tracking.sweep_run import SweepRun, lock_file

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
MAX_LAUNCHES = 3
"""How often one wave is launched, if the launcher loses its workers."""


def sweep(config_name: str, arguments: Sequence[str]) -> int:
    """Trains every run that is not finished. A run that fails does not stop the others.

    Returns:
        The exit code: 0 if all runs have finished, 1 if some have not, and that of the signal if
        one ended the sweep.

    Raises:
        InputError: there is a mistake in the arguments of any run; nothing has been written.
    """
    # Cached from here on, so that the manifest names the code that is running.
    code_digest()
    plan = make_plan(config_name, arguments)
    check_looks(plan)
    finished = {cell.folder: _finished(plan, cell) for cell in plan.cells}
    plan = plan.without_missing_states(finished)
    show_plan(plan, finished)
    if plan.settings.plan:
        return command_line.OK
    return Sweep(plan, finished, command=_command(arguments)).run()


def _command(arguments: Sequence[str]) -> str:
    added = [
        argument for folder in conf_folders()[1:] for argument in ("--config-dir", str(folder))
    ]
    return shlex.join(["python", "-m", "src.train", "--multirun", *added, *arguments])


def _finished(plan: Plan, cell: Cell) -> bool:
    """Whether a run has finished; raises InputError if its folder holds another run."""
    if plan.rerun:
        return False
    try:
        return finished_record(cell.config, cell.config.config_hash()) is not None
    except DamagedError as error:
        # Its job will fail with the same error, but the other runs can be trained.
        terminal.warn(str(error))
        return False


class Sweep:
    """A sweep in progress."""

    def __init__(self, plan: Plan, finished: dict[Path, bool], *, command: str) -> None:
        self.plan = plan
        self.folder = plan.folder / SWEEPS
        self.jobs = self.folder / plan.sweep_id
        self.stop_file = self.jobs / "stop"
        self.on_cluster = plan.settings.launcher == LAUNCHER
        self.signal: int | None = None
        self.board = terminal.JobBoard()
        self.report_failed = False
        self.manifest = Manifest(plan, finished, command=command)
        tracking = plan.cells[0].config.tracking
        self.mlflow: SweepRun | None = None
        if tracking.mlflow:
            self.mlflow = SweepRun(
                uri=tracking.uri or default_uri(),
                experiment=plan.study,
                sweep_id=plan.sweep_id,
                folder=self.folder,
            )
        self.parent_run_id: str | None = None

    def run(self) -> int:
        """Runs everything from the first wave to the report; returns the exit code."""
        self.jobs.mkdir(parents=True, exist_ok=True)
        # Not timeout=0, because a process that checks whether the sweep is alive holds the lock for
        # a moment.
        lock = filelock.FileLock(lock_file(self.folder, self.plan.sweep_id), timeout=1.0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(
                f"study={self.plan.study}: this sweep ({self.plan.sweep_id}) is already running"
            ) from error
        try:
            with self._signals():
                return self._run()
        finally:
            lock.release()

    def _run(self) -> int:
        for file in (self.jobs / "stop", self.jobs / "stop.now", *self.jobs.glob(f"*{MOVED}")):
            file.unlink(missing_ok=True)
        self.manifest.write(self.folder)
        try:
            self._run_waves()
        finally:
            # Even after an error, the manifest and the MLflow run must be closed.
            status = self._status()
            self.manifest.close(self.folder, status)
            report = self._report()
            if self.mlflow is not None:
                self._close_mlflow(self.mlflow, status, report)
        return self._exit_code(status)

    def _run_waves(self) -> None:
        if self.mlflow is not None:
            self.parent_run_id = self.mlflow.open(command=self.manifest.command)
            for cell in self.plan.cells:
                if self.manifest.is_finished(cell):
                    self.mlflow.adopt(cell.folder)
        for cells in rounds(self.plan, self.manifest):
            self.board.total += sum(not self.manifest.is_finished(cell) for cell in cells)
            for wave in dataclasses.replace(self.plan, cells=cells).waves():
                self._run_wave([cell for cell in wave if not self.manifest.is_finished(cell)])
                # The next wave may start from states of runs that another sweep is training.
                self._wait_for_others()
            if self.signal is not None:
                return

    # ------------------------------------------------------------------ jobs

    def _run_wave(self, cells: Sequence[Cell]) -> None:
        """Launches the jobs until every run has ended, because a launcher may lose workers."""
        waiting = list(cells)
        for _ in range(MAX_LAUNCHES):
            if not waiting or self.signal is not None:
                return
            files = [self._write_job(cell) for cell in waiting]
            try:
                n_jobs = self.plan.settings.n_jobs
                with Monitor(waiting, self._status_file, board=self.board, n_jobs=n_jobs):
                    self._launch(files)
            except Exception as error:  # An error of the launcher must not end the sweep.
                if self.signal is None:
                    terminal.warn(f"the launcher failed: {type(error).__name__}: {error}")
            for cell in waiting:
                self._take_state(cell)
            waiting = [cell for cell in waiting if self.manifest.state(cell) == "waiting"]

    def _launch(self, files: Sequence[Path]) -> None:
        """Returns when all jobs have ended, or when the sweep is to end and no job is running."""
        settings = self.plan.settings
        # With a hash of the folder, because the same sweep in another folder has other jobs.
        folder_hash = hashlib.sha256(str(self.jobs.resolve()).encode()).hexdigest()[:6]
        name = f"sweep-{self.plan.sweep_id}-{folder_hash}"
        if not self.on_cluster:
            launch(files, settings.typed, name=name, folder=self.jobs)
            return
        # Jobs that an earlier start of this sweep left in the queue would train the same runs.
        cancel_waiting(name)
        errors: list[Exception] = []

        def wait() -> None:
            try:
                launch(files, settings.typed, name=name, folder=self.jobs)
            except Exception as error:
                errors.append(error)

        # In a thread, because jobs may wait in the queue for days, and Ctrl-C must work meanwhile.
        thread = threading.Thread(target=wait, name="slurm", daemon=True)
        thread.start()
        is_cancelled = False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if self.signal is not None:
                is_cancelled = is_cancelled or cancel_waiting(name)
                if not self._is_any_running() or self.stop_file.with_suffix(".now").exists():
                    return
        if errors:
            # A single job without a result, such as a cancelled one, makes the launcher raise while
            # other jobs are still running.
            while self.signal is None and is_queued(name):
                time.sleep(POLL_SECONDS)
            raise errors[0]

    def _is_any_running(self) -> bool:
        statuses = [read_json(self._status_file(cell)) for cell in self.plan.cells]
        return any(status is not None and status["state"] == "running" for status in statuses)

    def _write_job(self, cell: Cell) -> Path:
        number = self.plan.cells.index(cell)
        file = self.jobs / f"job-{number}.json"
        self._status_file(cell).unlink(missing_ok=True)
        tracking = [f"tracking.sweep_id='{self.plan.sweep_id}'"]
        if self.parent_run_id is not None:
            tracking.append(f"tracking.parent_run_id='{self.parent_run_id}'")
        start = None
        if cell.start is not None:
            source = next(c for c in self.plan.cells if c.folder == cell.start.source)
            start = [str(cell.start.source), cell.start.step, source.key(cell.start.step)]
        Job(
            folder=str(cell.folder),
            arguments=[*cell.arguments, *tracking],
            start=start,
            rerun=self.plan.rerun,
            timeout=self.plan.settings.timeout,
            stop_file=str(self.stop_file),
            status_file=str(self._status_file(cell)),
            owner=None if self.on_cluster else [socket.gethostname(), os.getpid()],
            mlflow=self.mlflow is not None,
        ).write(file)
        return file.resolve()

    def _status_file(self, cell: Cell) -> Path:
        return self.jobs / f"status-{self.plan.cells.index(cell)}.json"

    def _take_state(self, cell: Cell) -> None:
        status = read_json(self._status_file(cell)) or {"state": "waiting", "reason": ""}
        state, reason = status["state"], status["reason"]
        if state == "running":
            # The worker died without writing a state. Its training process notices this and ends
            # with a checkpoint.
            state, reason = "waiting", "the launcher lost the worker of this job"
            if status["pid"] is not None and not self.on_cluster:
                _await_end(status["pid"])
        self.manifest.set(cell, state, reason)
        self.manifest.write(self.folder)
        if self.mlflow is not None and state not in ("finished", "busy", "waiting"):
            close_run(cell.folder, "FAILED" if state == "failed" else "KILLED")

    def _wait_for_others(self) -> None:
        """Waits for runs that others are training; trains those that they do not finish."""
        said = False
        while self.signal is None:
            busy = [c for c in self.plan.cells if self.manifest.state(c) == "busy"]
            if not busy:
                return
            if not said:
                terminal.say(f"waiting for {len(busy)} runs that other processes are training")
                said = True
            time.sleep(POLL_SECONDS)
            free = [cell for cell in busy if not is_held(writer_lock(cell.folder))]
            for cell in free:
                if finished_record(cell.config, cell.config.config_hash()) is not None:
                    self.manifest.set(cell, "finished", "by another process")
            self._run_wave([c for c in free if self.manifest.state(c) == "busy"])

    # ------------------------------------------------------------------ the end

    def _status(self) -> str:
        if all(map(self.manifest.is_done, self.plan.cells)):
            return "finished"
        return "failed" if self.signal is None else "killed"

    def _report(self) -> Any:
        from src.study.report.make_report import write_report

        if not any((cell.folder / "record.json").is_file() for cell in self.plan.cells):
            return None
        try:
            return write_report(self.plan.folder)
        except Exception as error:  # The sweep's MLflow run must still be closed.
            logger.exception("the report could not be written")
            self.report_failed = True
            terminal.error(
                f"the report could not be written ({type(error).__name__}: {error});"
                f" to try again, run python -m src.report study={self.plan.study}"
            )
            return None

    def _close_mlflow(self, mlflow: SweepRun, status: str, report: Any) -> None:
        statuses = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
        mlflow.close(
            statuses[status],
            metrics={} if report is None else report.headline,
            artifacts=[] if report is None else report.files,
            # MLflow does not allow commas in the name of a tag.
            tags={"status": status}
            | {
                f"jobs.{state.partition(',')[0].replace(' ', '_')}": count
                for state, count in self.manifest.counts().items()
            },
        )

    def _exit_code(self, status: str) -> int:
        states = self.manifest.counts()
        terminal.say(", ".join(f"{count} {state}" for state, count in states.items()))
        for cell in self.plan.cells:
            if self.manifest.state(cell) not in ("finished", "stopped", "waiting", "not needed"):
                reason = self.manifest.reason(cell)
                terminal.error(f"{cell.folder}: {self.manifest.state(cell)} ({reason})")
        if status == "killed":
            assert self.signal is not None
            how = "the same command without rerun=true" if self.plan.rerun else "the same command"
            terminal.say(f"stopped by a signal; to continue, run {how}")
            return 128 + self.signal
        return (
            command_line.OK
            if status == "finished" and not self.report_failed
            else command_line.FAILURE
        )

    # ------------------------------------------------------------------ signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, the first signal ends all jobs with a checkpoint, and a second one kills them."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.stop_file.with_suffix(".now").touch()
            return
        self.signal = number
        # Renamed when it is complete, because workers read it as soon as it exists.
        draft = self.jobs / "stop.part"
        draft.write_text(signal.Signals(number).name, encoding="utf-8")
        draft.replace(self.stop_file)
        print(
            "ending all jobs with a checkpoint; press Ctrl-C again to end them at once",
            file=sys.stderr,
        )


def _await_end(pid: int) -> None:
    """Waits until a process that is ending has ended; kills it if it takes too long."""
    deadline = time.monotonic() + MAX_GRACE_SECONDS
    while is_alive(pid):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return
        time.sleep(POLL_SECONDS)
