"""What holds before the heavy imports are done: Ctrl-C ends a command with one line."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

INTERRUPTED = 130


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Turns Ctrl-C into one line and exit code 130."""
    # Not by an exception at first: some modules that are imported turn it into an ImportError. An
    # ignored Ctrl-C stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except KeyboardInterrupt:
        _end()
    finally:
        imports_are_done()


def imports_are_done() -> None:
    """From here on Ctrl-C is an exception again, so that what is open can be closed."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> NoReturn:
    # Not sys.exit: an interrupt inside an import can leave the interpreter determined to die of the
    # signal, whatever the exit code.
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
