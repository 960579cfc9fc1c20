"""A process that another one has started ends with it, even where that one is killed.

A killed process can do nothing about its children, so each child looks after itself. Ours poll
their parent's number, which works on Linux and macOS alike. A program that is not ours gets this
module as its parent: `python -m src.common.orphans COMMAND ...`.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Between the wish that a program ends and its end by force."""


finishing = threading.Lock()
"""Held while this process has to end in an order of its own."""


def end_with(parent: int) -> None:
    """Ends this process soon after its parent, but not while it holds `finishing`.

    Args:
        parent: the process that has started this one. It passes its own number: asked here, it
            could be gone already, and another process be the parent.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        with finishing:
            os._exit(1)

    threading.Thread(target=follow, name="parent-watch", daemon=True).start()


def run_bound(command: Sequence[str]) -> int:
    """Runs a program that starts others; none of them outlives this process. Returns its code.

    SIGTERM ends them and this process with exit code 143.
    """
    previous = signal.signal(signal.SIGTERM, _terminated)
    process = subprocess.Popen(
        [sys.executable, "-m", "src.common.orphans", *command],
        stdin=subprocess.PIPE,
        # A group of its own, so that all of them can be ended.
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        return process.wait()
    finally:
        process.stdin.close()
        process.wait()
        # Where the program was killed, what it has started is still there.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        signal.signal(signal.SIGTERM, previous)


def _terminated(*_: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def main(command: Sequence[str]) -> int:
    """Runs the program until it ends, or until standard input ends, which the parent holds."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            os.killpg(0, signal.SIGKILL)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
