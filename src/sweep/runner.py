"""Carries a sweep out: skips what is finished, runs the rest in waves, reports."""

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
from src.run.lifecycle import run
from src.run.resume import finished_record
from src.sweep.cluster import LAUNCHER, cancel_waiting, is_queued
from src.sweep.job import MAX_GRACE_SECONDS, MOVED, Job, is_alive
from src.sweep.launch import launch
from src.sweep.manifest import Manifest
from src.sweep.monitor import Monitor
from src.sweep.plan import Cell, Plan, make_plan
from src.sweep.preview import show_plan
from src.tracking.push_state import SWEEPS, is_held, writer_lock
from src.tracking.sweep_run import SweepRun, close_run, lock_file

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
MAX_LAUNCHES = 3
"""Starts of one wave, where a launcher loses its workers."""


def train(arguments: Sequence[str] | None = None, *, usage: str = "") -> int:
    """What `python -m src.train` does with its arguments; returns the exit code."""
    return command_line.main("train", run, usage=usage, sweep=sweep, argv=arguments)


def sweep(config_name: str, arguments: Sequence[str]) -> int:
    """Trains every cell that is not finished; one that fails keeps no other from running.

    Returns:
        The exit code: 0 when all cells are finished, however they went; 1 when some are not; that
        of the signal when one ended the sweep.

    Raises:
        InputError: any cell is bad input; nothing has been trained or written then.
    """
    code_digest()
    plan = make_plan(config_name, arguments)
    finished = {cell.folder: _finished(plan, cell) for cell in plan.cells}
    plan = plan.with_states_that_will_be(finished)
    show_plan(plan, finished)
    if plan.settings.plan:
        return command_line.OK
    return Sweep(plan, finished, command=_command(arguments)).run()


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "src.train", "--multirun", *arguments])


def _finished(plan: Plan, cell: Cell) -> bool:
    """Whether a cell needs no training; raises InputError where its folder holds another run."""
    if plan.rerun:
        return False
    try:
        return finished_record(cell.config, cell.config.config_hash()) is not None
    except DamagedError as error:
        # Its own job refuses it; the others are no worse for it.
        terminal.warn(str(error))
        return False


class Sweep:
    """One sweep under way."""

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
        """Everything from the first wave to the report; returns the exit code."""
        self.jobs.mkdir(parents=True, exist_ok=True)
        # Who looks whether a sweep is alive holds its lock for a moment.
        lock = filelock.FileLock(lock_file(self.folder, self.plan.sweep_id), timeout=1.0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(
                f"study={self.plan.study}: this sweep ({self.plan.sweep_id}) is running already"
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
            # Whatever has come between, nothing is left open.
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
        self.board.total = sum(not self.manifest.is_finished(c) for c in self.plan.cells)
        for wave in self.plan.waves():
            self._run_wave([cell for cell in wave if not self.manifest.is_finished(cell)])
            # Before the next wave, which may start from what another sweep is training.
            self._wait_for_others()

    # ------------------------------------------------------------------ jobs

    def _run_wave(self, cells: Sequence[Cell]) -> None:
        """Launches until every cell has ended; a launcher may lose workers on its way."""
        waiting = list(cells)
        for _ in range(MAX_LAUNCHES):
            if not waiting or self.signal is not None:
                return
            files = [self._write_job(cell) for cell in waiting]
            try:
                n_jobs = self.plan.settings.n_jobs
                with Monitor(waiting, self._status_file, board=self.board, n_jobs=n_jobs):
                    self._launch(files)
            except Exception as error:  # a launcher that breaks must not take the sweep with it
                if self.signal is None:
                    terminal.warn(f"the launcher: {type(error).__name__}: {error}")
            for cell in waiting:
                self._take_state(cell)
            waiting = [cell for cell in waiting if self.manifest.state(cell) == "waiting"]

    def _launch(self, files: Sequence[Path]) -> None:
        """Returns when all jobs have ended, or this sweep is to end and none of them runs."""
        settings = self.plan.settings
        # The same sweep in another folder has other jobs.
        place = hashlib.sha256(str(self.jobs.resolve()).encode()).hexdigest()[:6]
        name = f"sweep-{self.plan.sweep_id}-{place}"
        if not self.on_cluster:
            launch(files, settings.typed, name=name, folder=self.jobs)
            return
        # What an earlier sweep has left in the queue would train the same.
        cancel_waiting(name)
        troubles: list[Exception] = []

        def wait() -> None:
            try:
                launch(files, settings.typed, name=name, folder=self.jobs)
            except Exception as error:
                troubles.append(error)

        # Beside this thread, because a queue may keep its jobs for days and Ctrl-C shall not wait.
        thread = threading.Thread(target=wait, name="slurm", daemon=True)
        thread.start()
        is_cancelled = False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if self.signal is not None:
                is_cancelled = is_cancelled or cancel_waiting(name)
                if not self._is_any_running() or self.stop_file.with_suffix(".now").exists():
                    return
        if troubles:
            # One job without an answer, such as one that was cancelled, ends the launcher's wait.
            while self.signal is None and is_queued(name):
                time.sleep(POLL_SECONDS)
            raise troubles[0]

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
            # Its worker is gone without a word; the process notices, and ends with a checkpoint.
            state, reason = "waiting", "lost with the launcher's worker"
            if status["pid"] is not None and not self.on_cluster:
                _await_end(status["pid"])
        self.manifest.set(cell, state, reason)
        self.manifest.write(self.folder)
        if self.mlflow is not None and state not in ("finished", "busy", "waiting"):
            close_run(cell.folder, "FAILED" if state == "failed" else "KILLED")

    def _wait_for_others(self) -> None:
        """Cells that another sweep was training: done by it, or else still to be done here."""
        said = False
        while self.signal is None:
            busy = [c for c in self.plan.cells if self.manifest.state(c) == "busy"]
            if not busy:
                return
            if not said:
                terminal.say(f"waiting for {len(busy)} runs that another sweep trains")
                said = True
            time.sleep(POLL_SECONDS)
            free = [cell for cell in busy if not is_held(writer_lock(cell.folder))]
            for cell in free:
                if finished_record(cell.config, cell.config.config_hash()) is not None:
                    self.manifest.set(cell, "finished", "by another sweep")
            self._run_wave([c for c in free if self.manifest.state(c) == "busy"])

    # ------------------------------------------------------------------ the end

    def _status(self) -> str:
        if all(self.manifest.is_finished(cell) for cell in self.plan.cells):
            return "finished"
        return "failed" if self.signal is None else "killed"

    def _report(self) -> Any:
        from src.study.report.make_report import write_report

        if not any((cell.folder / "record.json").is_file() for cell in self.plan.cells):
            return None
        try:
            return write_report(self.plan.folder)
        except Exception as error:  # the runs are made, and MLflow's parent is still to be closed
            logger.exception("the report could not be written")
            self.report_failed = True
            terminal.error(
                f"the report could not be written ({type(error).__name__}: {error});"
                f" python -m src.report study={self.plan.study} tries again"
            )
            return None

    def _close_mlflow(self, mlflow: SweepRun, status: str, report: Any) -> None:
        statuses = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
        mlflow.close(
            statuses[status],
            metrics={} if report is None else report.headline,
            artifacts=[] if report is None else report.files,
            # MLflow takes no comma in the name of a tag.
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
            if self.manifest.state(cell) not in ("finished", "stopped", "waiting"):
                reason = self.manifest.reason(cell)
                terminal.error(f"{cell.folder}: {self.manifest.state(cell)} ({reason})")
        if status == "killed":
            assert self.signal is not None
            how = "the same command without rerun=true" if self.plan.rerun else "the same command"
            terminal.say(f"stopped by a signal; {how} continues")
            return 128 + self.signal
        return (
            command_line.OK
            if status == "finished" and not self.report_failed
            else command_line.FAILURE
        )

    # ------------------------------------------------------------------ signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal ends all jobs in order, with checkpoints; a second one at once."""
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
        # Written whole before it appears, because workers read it at once.
        draft = self.jobs / "stop.part"
        draft.write_text(signal.Signals(number).name, encoding="utf-8")
        draft.replace(self.stop_file)
        print("ending all jobs with a checkpoint; once more ends them at once", file=sys.stderr)


def _await_end(pid: int) -> None:
    """Waits for a process that ends in order; ends it by force where it does not."""
    deadline = time.monotonic() + MAX_GRACE_SECONDS
    while is_alive(pid):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return
        time.sleep(POLL_SECONDS)
