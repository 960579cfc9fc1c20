"""The user's line that ran an operation, from Python's frames or from a graph node's traceback.

The line is that of the innermost frame that belongs neither to torch, nor to this package, nor to
the standard library. Code of a training framework is named only if there is no other.
"""

import linecache
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch

OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
STANDARD = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
INSTALLED = re.compile(r"[\\/](site|dist)-packages[\\/]")
FRAMEWORKS = re.compile(
    r"[\\/](lightning|pytorch_lightning|lightning_fabric|lightning_utilities|accelerate"
    r"|torchmetrics|deepspeed|transformers[\\/]trainer\w*\.py)([\\/]|$)"
)
"""Packages whose frames run the user's code, or are run by it on every step."""

MAX_LINES = 6
"""A statement over more lines than this is cut."""

_PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True, kw_only=True)
class Source:
    """A line of code."""

    file: str
    line: int
    code: str
    """The text of the statement, without the indentation of its first line."""

    @property
    def place(self) -> str:
        """File and line."""
        return f"{short_path(self.file)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.code.split())}"


def short_path(file: str) -> str:
    """A path relative to the working folder if it is below it, else the last two parts."""
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return os.sep.join(file.split(os.sep)[-2:]) if relative.startswith(os.pardir) else relative


def of_node(node: Any, stop: CodeType) -> Source | None:
    """The line of what is running: of a derivative that torch computes, that of its forward call.

    Args:
        node: the node of the graph whose derivative is computed; None in a forward pass.
        stop: as for `of_running_code`.
    """
    running = of_running_code(stop)
    # A backward pass that the user wrote is running code; others have only their forward call.
    is_own = node is None or re.search(r"Backward\d+$", node.name()) is None
    if node is None or (is_own and running is not None):
        return running
    return of_traceback(node.metadata.get("traceback_", []))


def of_running_code(stop: CodeType) -> Source | None:
    """The line of the user's innermost frame; None if there is none.

    Args:
        stop: the function at which the search ends, because its callers started the trace.
    """
    fallback = None
    for frame in _frames(stop):
        file = frame.f_code.co_filename
        rank = _rank(file)
        if rank == "user":
            return _of_frame(frame)
        if rank == "framework" and fallback is None:
            fallback = _of_frame(frame)
    return fallback


def of_traceback(lines: Sequence[str]) -> Source | None:
    """As `of_running_code`, for the traceback that a node of the graph keeps in anomaly mode."""
    fallback = None
    for entry in reversed(lines):
        place = _PLACE.search(entry)
        if place is None:
            continue
        file, line = place["file"], int(place["line"])
        if file.startswith(OURS) and "__torch_" not in entry:
            break
        rank = _rank(file)
        if rank is not None and (rank == "user" or fallback is None):
            found = Source(file=file, line=line, code=_text(file, line, line))
            if rank == "user":
                return found
            fallback = found
    return fallback


def _rank(file: str) -> str | None:
    """user, framework, or None for a file whose lines are never named."""
    if file in ("<string>", "<stdin>") or "ipython" in file:
        return "user"
    if file.startswith((OURS, TORCH, "<")):
        return None
    if INSTALLED.search(file) is None:
        return None if file.startswith(STANDARD) else "user"
    return "framework" if FRAMEWORKS.search(file) else "user"


def _frames(stop: CodeType) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not stop:
        yield frame
        frame = frame.f_back


def _of_frame(frame: FrameType) -> Source:
    """The whole statement that a frame is executing."""
    file, first = frame.f_code.co_filename, frame.f_lineno
    last = first
    position = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if position is not None and position[0] is not None and position[1] is not None:
        first, last = position[0], position[1]
    return Source(file=file, line=first, code=_text(file, first, last))


def _text(file: str, first: int, last: int) -> str:
    last = min(last, first + MAX_LINES - 1)
    lines = [linecache.getline(file, number).rstrip() for number in range(first, last + 1)]
    return "\n".join(lines).strip()
