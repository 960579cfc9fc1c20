"""metrics.jsonl, as it is written."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class MetricsWriter(Logger):
    """A Lightning logger that writes metrics.jsonl: one line a step, finite numbers only.

    Args:
        path: of the file, which is appended to.
        num_lines: that the run has written before.

    Attributes:
        latest: the last value of each metric that this process has logged.
        num_lines: that the run has written. Checkpoints and the record keep it, because nothing
            else tells of a line that is lost from the middle of the file.
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
        """See Logger."""
        return "metrics.jsonl"

    @property
    def version(self) -> int | None:
        """See Logger."""
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds figures to the line of their step; a new step writes the line before."""
        if step != self._step:
            self._write()
            self._step = step
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._line.update(finite)
        self.latest.update(finite)

    def flush(self) -> int:
        """Writes what is pending; returns how many lines the run has written by now."""
        self._write()
        return self.num_lines

    def finalize(self, status: str) -> None:
        """See Logger."""
        self._write()

    def close(self) -> None:
        """Writes what is pending and closes the file."""
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
                # Else the interpreter tries once more at its end, and says how that failed.
                with contextlib.suppress(OSError):
                    self._file.close()
                raise
            self.num_lines += 1
