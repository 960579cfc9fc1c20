"""The counts of a watched training, and the line at its end about steps that were not finite."""

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch

from nonfinite.muting import is_muted

LEFT_OUT = "left out by the GradScaler"


def to_stderr(line: str) -> None:
    """Prints a line to standard error; what `watch` says goes there by default."""
    print(line, file=sys.stderr, flush=True)


class Counted:
    """Counts steps and what became of those that were not finite; says so once, at the end.

    It also holds the incidents.

    The end is `say_closing_line`, or the end of the process. An object is not kept alive for that:
    when it is deleted, its line is kept, if it is for standard error.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.step = 0
        self.nonfinite_steps: list[int] = []
        self.incidents: list[dict[str, Any]] = []
        self.skipped = self.applied = self.raised = self.skipped_after_stop = 0
        self._is_said = False
        self._process = os.getpid()
        has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._is_muted = is_muted()
        is_first = not has_ranks or torch.distributed.get_rank() == 0
        self._speaks = is_first and not self._is_muted
        _open.add(self)

    def __del__(self) -> None:
        line = self._taken()
        if line is not None and self.say is to_stderr:
            _left.append((self._process, line))

    def summary(self) -> dict[str, Any]:
        """Steps, non-finite steps, skipped steps, and the line of each incident."""
        return {
            "steps": self.step,
            "nonfinite_steps": list(self.nonfinite_steps),
            "skipped_steps": self.skipped,
            "incidents": [incident["line"] for incident in self.incidents],
        }

    def _has(self, kind: str) -> bool:
        return any(incident["kind"] == kind for incident in self.incidents)

    def _what(self) -> str:
        lines = [i["line"] for i in self.incidents if i["step"] == self.step]
        return lines[0] if lines else f"step {self.step}: non-finite gradient"

    def say_closing_line(self) -> None:
        """Says how many steps were not finite, if any, unless that has been said."""
        line = self._taken()
        if line is not None:
            self.say(line)

    def _taken(self) -> str | None:
        """The line, if it has not been said; from now on it counts as said."""
        if getattr(self, "_is_said", True):
            return None
        self._is_said = True
        return self.closing_line() if self._speaks and self._process == os.getpid() else None

    def closing_line(self) -> str | None:
        """How many steps were not finite and what became of them; None if all were finite."""
        fates = {"skipped": self.skipped, "applied": self.applied, "not applied": self.raised}
        rest = len(self.nonfinite_steps) - sum(fates.values())
        line = line_of(self.step, self.nonfinite_steps, {**fates, LEFT_OUT: rest})
        if line is not None and self.skipped_after_stop:
            line += f"; {self.skipped_after_stop} finite steps after it were skipped as well"
        return line


def line_of(num_steps: int, nonfinite: Sequence[int], fates: Mapping[str, int]) -> str | None:
    """How many steps were not finite and what became of them; None if all were finite.

    Args:
        num_steps: the number of all steps.
        nonfinite: the numbers of those that were not finite.
        fates: how many were skipped, applied and so on; zeros are left out.
    """
    num = len(nonfinite)
    if not num:
        return None
    were = "was" if num == 1 else "were"
    there = {fate: count for fate, count in fates.items() if count > 0}
    what = f" ({', '.join(f'{count} {fate}' for fate, count in there.items())})"
    if len(there) == 1:
        what = f" and {were} {next(iter(there))}"
    first = f": step {nonfinite[0]}" if num == 1 else f", the first at step {nonfinite[0]}"
    return f"{num} of {num_steps} steps {were} not finite{what}{first}"


_open: WeakSet[Counted] = WeakSet()
_left: list[tuple[int, str]] = []
"""Process and line of what has gone before the end of its process."""


def forget() -> None:
    """Says nothing at the end of the process about what has been watched so far."""
    for counted in list(_open):
        counted._is_said = True
    _open.clear()
    _left.clear()


@atexit.register
def _say_all() -> None:
    for process, line in _left:
        if process == os.getpid():
            to_stderr(line)
    for counted in list(_open):
        counted.say_closing_line()
    forget()
