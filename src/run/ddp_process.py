"""`python -m src.run.ddp_process`: a rank of a run other than rank 0, which starts it."""

import os
import signal
import sys
import threading
from pathlib import Path

from src.config.compose import compose
from src.run.ddp import FAILURE, READY, Orders
from src.run.lifecycle import follow


def main() -> int:
    """Reads its orders and trains its share of the rows."""
    orders = Orders.read(sys.stdin.readline())
    # Rank 0 reads one line from this standard output; everything else must go to the log.
    answers = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_rank_0, name="rank-0-watch", daemon=True).start()
    # Signals stop rank 0, which tells the other ranks at the end of the step.
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


def _end_with_rank_0() -> None:
    # Standard input is a pipe from rank 0: it ends when rank 0 ends.
    sys.stdin.read()
    os._exit(FAILURE)


if __name__ == "__main__":
    sys.exit(main())
