"""metrics.jsonl, as it is written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class MetricsWriter(Logger):
    """A Lightning logger that writes metrics.jsonl: one line a step, finite numbers only.

    Attributes:
        latest: the last value of each metric that this process has logged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
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

    def save(self) -> None:
        """Writes what is pending; called before a checkpoint."""
        self._write()

    def finalize(self, status: str) -> None:
        """See Logger."""
        self._write()

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        if self._line:
            self._file.write(json.dumps({"step": self._step, **self._line}) + "\n")
            self._file.flush()
            self._line = {}
