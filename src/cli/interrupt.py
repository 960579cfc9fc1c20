"""Start and end of a command: one line for Ctrl-C or a missing library, no collection of garbage.

This module imports nothing heavy, so that it takes effect at once.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from src.cli.missing_module import missing_library

BAD_INPUT, INTERRUPTED = 2, 130

_pauses_collection = False
"""Whether garbage is not collected because of `importing`."""

# The interpreter's last collections would visit every object of torch and MLflow, which takes
# seconds. The system frees the memory in any case.
atexit.register(gc.freeze)


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Inside this context Ctrl-C prints one line and exits with code 130.

    What is imported here is imported as in `importing`, until `imports_are_done` is called. A
    library that this Python lacks also ends the command with one line.
    """
    try:
        with importing():
            yield
    except KeyboardInterrupt:
        _end()
    except ModuleNotFoundError as error:
        line = missing_library(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(BAD_INPUT)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside this context Ctrl-C exits at once, because nothing is open that has to be closed.

    Garbage is not collected: imports make many objects and no garbage, and would take a fifth
    longer.
    """
    global _pauses_collection
    if gc.isenabled():
        _pauses_collection = True
        gc.disable()
    # A handler that exits replaces KeyboardInterrupt, which some imported modules would turn into
    # an ImportError. A Ctrl-C that the parent ignores stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        imports_are_done()


def imports_are_done() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, so that open files and runs get closed.

    Garbage is collected again.
    """
    global _pauses_collection
    if _pauses_collection:
        _pauses_collection = False
        gc.enable()
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> NoReturn:
    # Not sys.exit: after an interrupted import the interpreter may end by the signal instead of
    # with this exit code.
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
