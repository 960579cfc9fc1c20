"""Everything printed on the terminal: lines, tables and progress bars."""

import contextlib
import logging
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_live: Console | None = None
"""The console on which a progress bar or job board is being drawn; None if there is neither."""


def console() -> Console:
    """Standard output, looked up at each call so that tests and redirections see it."""
    return _console_of(sys.stdout)


def _console_of(stream: TextIO) -> Console:
    """The console for a stream.

    While a bar is drawn, lines for the terminal go through the bar's console, which prints them
    above it. A redirected stream, such as `2> log`, is written directly.
    """
    return _live if _live is not None and stream.isatty() else _plain(file=stream)


@contextlib.contextmanager
def _drawing(drawn: Live | Progress) -> Iterator[None]:
    """Inside, everything written to the terminal appears above the bar or board."""
    global _live
    before = sys.stdout, sys.stderr
    with drawn:
        _live = drawn.console
        # Rich replaces sys.stdout and sys.stderr, but logging handlers keep the original streams.
        proxies = dict(zip(before, (sys.stdout, sys.stderr), strict=True))
        moved = {h: h.stream for h in _stream_handlers() if h.stream in before}
        for handler, stream in moved.items():
            handler.setStream(proxies[stream])
        try:
            yield
        finally:
            for handler, stream in moved.items():
                handler.setStream(stream)
            _live = None


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [h for each in loggers for h in getattr(each, "handlers", ())]
    return [h for h in dict.fromkeys(handlers) if type(h) is logging.StreamHandler]


def _plain(**settings: Any) -> Console:
    """A console without markup: `module:leaf:` is a name, not an emoji."""
    return Console(highlight=False, emoji=False, soft_wrap="width" not in settings, **settings)


def say(line: str) -> None:
    """Prints a line unchanged, such as a command or a path to copy."""
    console().print(Text(line))


def sentence(line: str) -> None:
    """Prints a line of prose, wrapped between words on a terminal."""
    _tell(Text(line), console())


def warn(line: str) -> None:
    """Prints a warning on standard error."""
    _tell(Text.assemble(("warning:", "yellow"), " ", line), _console_of(sys.stderr))


def error(line: str) -> None:
    """Prints the one line that says why a command did nothing."""
    one_line = " ".join(line.split())
    _tell(Text.assemble(("error:", "red"), " ", one_line), _console_of(sys.stderr))


def _tell(text: Text, out: Console) -> None:
    """Wraps between words on a terminal, without breaking paths."""
    if out.is_terminal:
        lines = textwrap.fill(text.plain, out.width, break_long_words=False, break_on_hyphens=False)
        text = Text(lines, spans=text.spans)
    out.print(text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; all columns but the first hold numbers and are aligned right."""
    drawn = Table()
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*map(Text, row))
    # Output to a file has no width of its own; 120 columns are enough for paths.
    out = console()
    sentence(title)
    (out if out.is_terminal else _plain(width=120)).print(drawn)


def number(value: float | None, digits: int = 4) -> str:
    """A number as text; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.{digits}g}"


class StepProgress:
    """A progress bar over optimizer steps with a few metrics; prints nothing outside a terminal."""

    def __init__(self, *, total: int, done: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=console(),
            disable=not console().is_terminal,
            # A redirected standard error must not be captured and shown on the terminal.
            redirect_stderr=sys.stderr.isatty(),
        )
        self._open = contextlib.ExitStack()
        if not self._bar.disable:
            self._open.enter_context(_drawing(self._bar))
        self._task = self._bar.add_task("training", total=total, completed=done, metrics="")

    def update(self, step: int, metrics: Mapping[str, str]) -> None:
        """Shows a step number and metrics."""
        text = "  ".join(f"{name} {value}" for name, value in metrics.items())
        self._bar.update(self._task, completed=step, metrics=text)

    def close(self) -> None:
        """Stops drawing; the bar stays on the terminal."""
        self._open.close()


@contextlib.contextmanager
def counting(what: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over items; yields a function that sets how many are done."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
    bar = Progress(
        *columns,
        TextColumn(unit),
        console=console(),
        disable=not console().is_terminal,
        redirect_stderr=sys.stderr.isatty(),
    )
    with contextlib.nullcontext() if bar.disable else _drawing(bar):
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """The progress of one run of a sweep."""

    step: int
    total: int
    loss: float | None
    left: float | None
    """Estimated remaining seconds."""


class JobBoard:
    """A sweep's progress: a live line for each running job, a permanent line for each ended one."""

    def __init__(self) -> None:
        self.total = self.num_ended = 0
        self._live: Live | None = None
        self._open = contextlib.ExitStack()

    def open(self) -> None:
        """Starts drawing, if standard output is a terminal."""
        out = console()
        if out.is_terminal:
            self._live = Live(
                console=out,
                refresh_per_second=2,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._open.enter_context(_drawing(self._live))

    def ended(self, name: str, state: str, reason: str, seconds: float) -> None:
        """Prints how a job ended."""
        self.num_ended += 1
        why = f" ({reason})" if reason else ""
        say(f"[{self.num_ended}/{self.total}] {name}: {state} after {duration(seconds)}{why}")

    def show(self, running: Mapping[str, JobProgress], *, left: float | None) -> None:
        """Redraws the running jobs."""
        if self._live is None:
            return
        table = Table.grid(padding=(0, 2))
        for name, job in running.items():
            percent = f"{job.step:,}/{job.total:,}"
            rest = "" if job.left is None else f"{duration(job.left)} left"
            table.add_row(Text(name), percent, f"loss {number(job.loss)}", rest)
        whole = "" if left is None else f", about {duration(left)} left"
        table.add_row(f"{self.num_ended} of {self.total} jobs ended{whole}")
        self._live.update(table)

    def close(self) -> None:
        """Stops drawing."""
        self._open.close()
        self._live = None


def duration(seconds: float) -> str:
    """A duration as text: 42 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"
