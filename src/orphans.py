"""A process that another one has started ends with it, even where that one is killed.

Nothing that a killed process would do about its children can be relied on, so each child looks
after itself. It polls its parent's number, which works on Linux and macOS alike.
"""

import os
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 0.5


def _exit() -> None:
    os._exit(1)


def end_with(parent: int, end: Callable[[], None] = _exit) -> None:
    """Ends this process soon after its parent.

    Args:
        parent: the process that has started this one. It passes its own number: asked here, it
            could be gone already, and another process be the parent.
        end: what ends this process; called in a thread of its own.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        end()

    threading.Thread(target=follow, name="parent-watch", daemon=True).start()
