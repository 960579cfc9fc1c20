"""The files of a run folder: config, metrics, record, checkpoints and log; one writer at a time."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import yaml

from src.common.errors import InputError, damaged
from src.common.tracking_address import masked

MAX_NAME = 255
"""The longest file name that common file systems allow, in bytes."""


def check_study(name: str) -> None:
    """Raises InputError if a study's name cannot be used as a folder name."""
    if name in ("", ".", "..") or re.search(r"[^A-Za-z0-9._+-]", name):
        raise InputError(f"study={name}: may hold only letters, digits and . _ + -")
    if len(name) > MAX_NAME:
        raise InputError(
            f"study={name[:20]}...: has {len(name)} characters, must have at most {MAX_NAME}"
        )


class RunFolder:
    """The files of one run, and the lock that its writer holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        # The timeout is needed because a process that tests the lock holds it for a moment.
        self._lock = filelock.FileLock(path / ".lock", timeout=0.3)
        self._log_handler: logging.Handler | None = None

    def open(self) -> None:
        """Creates the folder, takes the lock and starts train.log.

        Raises:
            InputError: the folder cannot be written, or another process is writing it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.checkpoints.mkdir(exist_ok=True)
            handler = _RunLog(self.path / "train.log", encoding="utf-8")
        except filelock.Timeout as error:
            raise InputError(f"paths.runs: {self.path} is being written by another run") from error
        except OSError as error:
            raise InputError(
                f"paths.runs: {self.path} cannot be written ({error.strerror})"
            ) from error
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        self._log_handler = handler

    def close(self) -> None:
        """Closes train.log and releases the lock."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            with suppress(OSError):
                self._log_handler.close()
            self._log_handler = None
        self._lock.release()

    def read_record(self) -> dict[str, Any] | None:
        """The content of record.json, or None if there is no such file. Raises DamagedError."""
        file = self.path / "record.json"
        with damaged(file):
            record = read_json(file)
            if record is not None and not {"status", "final", "best", "guard"} <= set(record):
                raise ValueError("incomplete")
            return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes record.json atomically."""
        write_json(self.path / "record.json", record)

    def read_config(self) -> dict[str, Any] | None:
        """The content of config.yaml with its hash, or None in a new folder. Raises InputError."""
        file = self.path / "config.yaml"
        if self._forking.exists():
            # A kill interrupted the copying of another run's state, so the folder counts as new.
            return None
        if not file.is_file():
            if (self.path / "record.json").exists() or self.metrics.exists():
                raise InputError(f"{file}: is missing; rerun=true moves the folder aside")
            return None
        with damaged(file):
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not isinstance(config, dict) or "config_hash" not in config:
                raise ValueError("incomplete")
            return config

    def write_config(self, config: Mapping[str, Any], *, config_hash: str) -> None:
        """Writes config.yaml atomically."""
        draft = self.path / "config.yaml.part"
        text = yaml.safe_dump({**config, "config_hash": config_hash}, sort_keys=False)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path / "config.yaml")

    @property
    def _forking(self) -> Path:
        return self.path / ".forking"

    def begin_fork(self) -> None:
        """Marks the folder as incomplete until `end_fork`."""
        self._forking.touch()

    def end_fork(self) -> None:
        """Marks the folder as complete."""
        self._forking.unlink()

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the last saved state; None if nothing was saved.

        Raises:
            InputError: last.ckpt is missing although other checkpoints exist.
        """
        file = self.last
        if file.is_file():
            return file
        others = sorted(self.checkpoints.glob("step-*.ckpt"), key=lambda p: p.stat().st_mtime)
        if others:
            raise InputError(
                f"{file}: is missing; resume={others[-1]} continues from there,"
                " rerun=true moves the folder aside"
            )
        return None

    def drop_all_but_last_checkpoint(self) -> None:
        """Deletes all checkpoints of single steps, as a finished run of a study does."""
        for file in self.checkpoints.glob("step-*.ckpt"):
            file.unlink()

    def cut_metrics(self, *, step: int) -> int:
        """Drops the lines after `step`, and a last line that was cut off by a kill.

        Returns:
            The number of remaining lines.
        """
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
        self.write_metrics(kept)
        return len(kept)

    def write_metrics(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Replaces metrics.jsonl atomically."""
        draft = self.metrics.with_suffix(".part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(draft, self.metrics)

    def move_aside(self) -> Path | None:
        """Renames an existing folder by adding the time to its name; deletes nothing."""
        if not self.path.exists():
            return None
        aside = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        try:
            with filelock.FileLock(self.path / ".lock", timeout=0.3):
                shutil.move(self.path, aside)
        except filelock.Timeout as error:
            raise InputError(f"rerun=true: {self.path} is being written by another run") from error
        except OSError as error:
            raise InputError(f"rerun=true: {self.path} cannot be moved ({error})") from error
        return aside


class _Formatter(logging.Formatter):
    """Masks the secrets of tracking addresses in log lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _RunLog(logging.FileHandler):
    """train.log. On a full disk the writers of other files report the error, once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, of logging
        """Does nothing; logging would print a traceback for every line."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl; empty if there is no such file.

    Raises:
        DamagedError: a line is not one that MetricsWriter wrote.
    """
    if not path.is_file():
        return []
    found = []
    # Text after the last line break is a line that was cut off by a kill.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        with damaged(path, line=number):
            metrics = json.loads(line.decode("utf-8"))
            if not all(type(value) in (int, float) for value in metrics.values()):
                raise ValueError("not a number")
            metrics["step"]
        found.append(metrics)
    return found


def lost_lines(found: int, written: int) -> str:
    """The message about a metrics.jsonl that has fewer lines than the run wrote."""
    return f"{written - found} of the {written} lines that the run wrote are missing"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no file. Raises DamagedError if it is not an object."""
    if not path.is_file():
        return None
    with damaged(path):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
