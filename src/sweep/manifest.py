"""The manifest of a sweep: what was run, and how each run ended."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from src.common.environment import code_digest, git_facts
from src.common.run_folder import write_json
from src.sweep.plan import Cell, Plan

SCHEMA = 1


class Manifest:
    """runs/<study>/.sweeps/<sweep_id>.json, updated while the sweep runs.

    The states of a run are waiting, finished, failed, killed, timed out, stopped (because the sweep
    ended), busy (another process is training it) and not needed (a sequential sweep had decided its
    arm).
    """

    def __init__(self, plan: Plan, finished: dict[Path, bool], *, command: str) -> None:
        self.plan, self.command = plan, command
        self.status = "running"
        self.started, self._began = time.time(), time.monotonic()
        self.ended: float | None = None
        self._states = {
            cell.folder: ("finished", "before") if finished[cell.folder] else ("waiting", "")
            for cell in plan.cells
        }

    def state(self, cell: Cell) -> str:
        return self._states[cell.folder][0]

    def reason(self, cell: Cell) -> str:
        """Why the run is in its state, in a few words."""
        return self._states[cell.folder][1]

    def is_finished(self, cell: Cell) -> bool:
        return self.state(cell) == "finished"

    def is_done(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a run."""
        return self.state(cell) in ("finished", "not needed")

    def set(self, cell: Cell, state: str, reason: str) -> None:
        self._states[cell.folder] = (state, reason)

    def counts(self) -> dict[str, str]:
        """The number of runs in each state; those that had finished before are counted apart."""
        states = Counter(
            "skipped, finished before" if entry == ("finished", "before") else entry[0]
            for entry in self._states.values()
        )
        return {state: str(count) for state, count in sorted(states.items())}

    def close(self, folder: Path, status: str) -> None:
        """Writes the manifest for the last time."""
        # From the monotonic clock, so that the end is never before the start if the clock is set.
        self.status, self.ended = status, self.started + time.monotonic() - self._began
        self.write(folder)

    def write(self, folder: Path) -> None:
        write_json(folder / f"{self.plan.sweep_id}.json", self._plain())

    def _plain(self) -> dict[str, Any]:
        settings = self.plan.settings
        return {
            "schema": SCHEMA,
            "study": self.plan.study,
            "sweep_id": self.plan.sweep_id,
            "experiment": settings.experiment,
            "command": self.command,
            "share_prefix": settings.share_prefix,
            "looks": self.plan.looks,
            "primary": settings.primary,
            "status": self.status,
            "started": self.started,
            "ended": self.ended,
            "code": code_digest(),
            **git_facts(),
            "dropped": self.plan.dropped,
            "cells": [self._cell(cell) for cell in self.plan.cells],
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        state, reason = self._states[cell.folder]
        return {
            "folder": "/".join(cell.folder.parts[-2:]),
            "variant": cell.config.variant_name,
            "seed": cell.config.seed,
            "repeat": cell.config.repeat,
            "baseline": cell.baseline,
            "added": cell.added,
            "start_step": None if cell.start is None else cell.start.step,
            "state": state,
            "reason": reason,
        }
