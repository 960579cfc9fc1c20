"""Child processes that end when their parent ends, even if the parent is killed.

A killed process cannot end its children, so each child watches its parent. This project's own
processes poll the parent's process id, which works on Linux and macOS. Any other program is started
with this module as its parent: `python -m src.common.orphans COMMAND ...`.
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
"""Time between SIGTERM and SIGKILL."""


finishing = threading.Lock()
"""Held while this process shuts down in order, so that `end_with` does not cut it short."""


def end_with(parent: int) -> None:
    """Ends this process soon after its parent ends, but not while `finishing` is held.

    Args:
        parent: id of the process that started this one. The parent passes its own id, because by
            the time os.getppid() runs here the parent may be gone and another process adopted us.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        with finishing:
            os._exit(1)

    threading.Thread(target=follow, name="parent-watch", daemon=True).start()


def run_bound(command: Sequence[str]) -> int:
    """Runs a program; neither it nor its children outlive this process. Returns its exit code.

    SIGTERM ends them all, and this process with exit code 143.
    """
    previous = signal.signal(signal.SIGTERM, _terminated)
    process = subprocess.Popen(
        [sys.executable, "-m", "src.common.orphans", *command],
        stdin=subprocess.PIPE,
        # A process group of its own, so that one signal reaches the program and its children.
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        return process.wait()
    finally:
        process.stdin.close()
        process.wait()
        # If the program itself was killed, its children are still running.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        signal.signal(signal.SIGTERM, previous)


def _terminated(*_: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def main(command: Sequence[str]) -> int:
    """Runs the program until it ends or standard input closes, which means the parent is gone."""
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
