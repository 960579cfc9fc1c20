"""What holds before the heavy imports are done: Ctrl-C ends a command with one line."""

import contextlib
import os
import sys
from collections.abc import Iterator

INTERRUPTED = 130


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Turns Ctrl-C into one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        # Not sys.exit: an interrupt inside an import can leave the interpreter determined to die
        # of the signal, whatever the exit code.
        os._exit(INTERRUPTED)
