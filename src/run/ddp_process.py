"""`python -m src.run.ddp_process`: a process of a run other than the first, which starts it."""

import os
import signal
import sys
import threading
from pathlib import Path

from src.config.compose import compose
from src.run.ddp import FAILURE, READY, Orders
from src.run.lifecycle import follow


def main() -> int:
    """Reads its orders, and trains the rows that are its own."""
    orders = Orders.read(sys.stdin.readline())
    # The first reads one word there; all else that is said goes to the log.
    answers = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_first, name="first-watch", daemon=True).start()
    # The first alone is asked to stop, and tells the others at the end of the step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return follow(
        compose("train", orders.arguments),
        place=orders.place,
        start=None if orders.start is None else Path(orders.start),
        ready=lambda: _say_ready(answers),
    )


def _say_ready(answers: int) -> None:
    os.write(answers, READY.encode())
    os.close(answers)


def _end_with_first() -> None:
    sys.stdin.read()
    os._exit(FAILURE)


if __name__ == "__main__":
    sys.exit(main())
