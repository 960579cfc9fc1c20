"""A run folder: config, metrics, record, checkpoints, log. One writer at a time."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import yaml

from src.common.errors import DamagedError, InputError
from src.common.tracking_address import masked

MAX_NAME = 255
"""Bytes that a file system takes for a name."""


def check_study(name: str) -> None:
    """Raises InputError where a study's name cannot name a folder."""
    if name in ("", ".", "..") or re.search(r"[^A-Za-z0-9._+-]", name):
        raise InputError(f"study={name}: may hold letters, digits and . _ + - only")
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
        # Who looks whether a lock is held holds it for a moment.
        self._lock = filelock.FileLock(path / ".lock", timeout=0.3)
        self._log_handler: logging.Handler | None = None

    def open(self) -> None:
        """Creates the folder and takes the lock.

        Raises:
            InputError: it cannot be written, or another process writes it.
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
        """Gives the lock back."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            with suppress(OSError):
                self._log_handler.close()
            self._log_handler = None
        self._lock.release()

    def read_record(self) -> dict[str, Any] | None:
        """record.json, or None where there is none. Raises InputError where it is damaged."""
        file = self.path / "record.json"
        with damaged(file):
            record = read_json(file)
            if record is not None and not {"status", "final", "best", "guard"} <= set(record):
                raise ValueError("incomplete")
            return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes record.json, whole or not at all."""
        write_json(self.path / "record.json", record)

    def read_config(self) -> dict[str, Any] | None:
        """config.yaml with its hash, or None in a new folder. Raises InputError where damaged."""
        file = self.path / "config.yaml"
        if self._forking.exists():
            # A kill came while the folder was filled with another run's state: as good as new.
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
        """Writes config.yaml, whole or not at all."""
        draft = self.path / "config.yaml.part"
        text = yaml.safe_dump({**config, "config_hash": config_hash}, sort_keys=False)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path / "config.yaml")

    @property
    def _forking(self) -> Path:
        return self.path / ".forking"

    def begin_fork(self) -> None:
        """From here on the folder is incomplete, until `end_fork`."""
        self._forking.touch()

    def end_fork(self) -> None:
        """The folder is whole."""
        self._forking.unlink()

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the last saved state, if any was saved.

        Raises:
            InputError: it is gone, but others are there.
        """
        file = self.last
        if file.is_file():
            return file
        others = sorted(self.checkpoints.glob("step-*.ckpt"), key=lambda p: p.stat().st_mtime)
        if others:
            raise InputError(
                f"{file}: is missing; resume={others[-1]} goes on from there,"
                " rerun=true moves the folder aside"
            )
        return None

    def drop_all_but_last_checkpoint(self) -> None:
        """What a finished run of a study keeps."""
        for file in self.checkpoints.glob("step-*.ckpt"):
            file.unlink()

    def cut_metrics(self, *, step: int) -> int:
        """Drops the lines after `step`, and a last line that a kill left half-written.

        Returns:
            How many lines are left.
        """
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
        self.write_metrics(kept)
        return len(kept)

    def write_metrics(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Writes metrics.jsonl anew, whole or not at all."""
        draft = self.metrics.with_suffix(".part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(draft, self.metrics)

    def move_aside(self) -> Path | None:
        """Renames an existing folder to one with the time in its name; nothing is deleted."""
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
    """Writes lines and tracebacks without the secrets of addresses in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a line, and masks the addresses in it."""
        return masked(super().format(record))


class _RunLog(logging.FileHandler):
    """train.log; where its disk is full, what else is written there says so, and once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, of logging
        """Nothing, in place of a traceback a line."""


@contextmanager
def damaged(
    file: Path, *, advice: str = "rerun=true moves the folder aside", line: int | None = None
) -> Iterator[None]:
    """Turns what reading a damaged file raises into one line that says what to do.

    Args:
        file: what is read.
        advice: what the user can do about it.
        line: number of the line that is read; None: the whole file.
    """
    try:
        yield
    # A few kilobytes of brackets are too deep for the parsers of JSON and YAML.
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        if isinstance(error, InputError):
            raise
        place = "" if line is None else f" in line {line}"
        raise DamagedError(f"{file}: is damaged{place}; {advice}") from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl; empty where there is none.

    Raises:
        DamagedError: a line is not what MetricsWriter writes.
    """
    if not path.is_file():
        return []
    found = []
    # What follows the last line break was cut by a kill.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        with damaged(path, line=number):
            figures = json.loads(line.decode("utf-8"))
            if not all(type(value) in (int, float) for value in figures.values()):
                raise ValueError("not a number")
            figures["step"]
        found.append(figures)
    return found


def lost_lines(found: int, written: int) -> str:
    """What is said of a metrics.jsonl that has fewer lines than the run wrote."""
    return f"{written - found} of the {written} lines that the run wrote are missing"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file. Raises DamagedError where it is none."""
    if not path.is_file():
        return None
    with damaged(path):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
