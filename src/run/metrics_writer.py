"""Writes metrics.jsonl during training."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class MetricsWriter(Logger):
    """A Lightning logger that writes metrics.jsonl: one line per step, finite numbers only.

    Args:
        path: the file, to which lines are appended.
        num_lines: the number of lines that the run has written before.

    Attributes:
        latest: the last value of each metric that this process has logged.
        num_lines: the number of lines that the run has written. Checkpoints and the record store
            it, so that lines lost from the middle of the file are noticed.
    """

    def __init__(self, path: Path, *, num_lines: int) -> None:
        super().__init__()
        self.num_lines = num_lines
        self._file = path.open("a", encoding="utf-8")
        self._step: int | None = None
        self._line: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "metrics.jsonl"

    @property
    def version(self) -> int | None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds the hyperparameters."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the line of their step; the first of a new step writes the last line."""
        if step != self._step:
            self._write()
            self._step = step
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._line.update(finite)
        self.latest.update(finite)

    def flush(self) -> int:
        """Writes the pending line; returns the number of lines that the run has written."""
        self._write()
        return self.num_lines

    def finalize(self, status: str) -> None:
        self._write()

    def close(self) -> None:
        """Writes the pending line and closes the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        if self._line:
            text = json.dumps({"step": self._step, **self._line}) + "\n"
            self._line = {}
            try:
                self._file.write(text)
                self._file.flush()
            except OSError:
                # Closed here, because otherwise the interpreter would try to flush again when it
                # exits, and print that error as well.
                with contextlib.suppress(OSError):
                    self._file.close()
                raise
            self.num_lines += 1
