"""`python -m src.run.rank`: a process of a run other than the first, which starts it."""

import os
import signal
import sys
import threading
from pathlib import Path

from src.config import compose
from src.run.lifecycle import follow
from src.run.ranks import FAILURE, READY, Orders


def main() -> int:
    """Reads its orders, and trains the rows that are its own."""
    orders = Orders.read(sys.stdin.readline())
    threading.Thread(target=_end_with_first, name="first-watch", daemon=True).start()
    # The first alone is asked to stop, and tells the others at the end of the step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return follow(
        compose("train", orders.arguments),
        place=orders.place,
        start=None if orders.start is None else Path(orders.start),
        ready=_say_ready,
    )


def _say_ready() -> None:
    os.write(1, READY.encode())
    # Nobody reads any more: what else is said goes to the log.
    os.dup2(2, 1)


def _end_with_first() -> None:
    sys.stdin.read()
    os._exit(FAILURE)


if __name__ == "__main__":
    sys.exit(main())
