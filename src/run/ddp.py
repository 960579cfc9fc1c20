"""The processes of a run on several devices: their ranks, how they are started and watched.

Rank 0 is the process of the command. It alone checks the configuration, writes files and prints. It
starts the other ranks once everything is checked, and they end when it ends, for whatever reason.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from src.common import terminal

COMMAND = ("-m", "src.run.ddp_process")
"""Arguments of Python for a rank other than 0."""

READY = "ready\n"
"""What such a process writes to its standard output when it is about to train."""

END_SECONDS = 20.0
"""How long rank 0 waits for all other ranks to end after training."""
GRACE_SECONDS = 30.0
"""After the death of another rank, how long rank 0 may go on before it exits. It may be waiting for
the dead rank for ever."""

FAILURE = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process of a run. All processes of a run are on one machine."""

    rank: int
    """From 0."""
    world_size: int
    """Number of processes."""
    port: int
    """The port on 127.0.0.1 at which the processes meet; 0 if there is only one."""


class Ranks(ClusterEnvironment):
    """Tells Lightning the rank of this process.

    Passed to Lightning even if there is only one process. Otherwise Lightning would detect a Slurm
    job by itself, take it for a run on several nodes, and requeue it.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        """False, because the place is passed in and never detected."""
        return False

    def world_size(self) -> int:
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        """Does nothing: the size is fixed."""

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the rank is fixed."""

    def local_rank(self) -> int:
        return self.place.rank

    def node_rank(self) -> int:
        return 0


def first_place(world_size: int) -> Place:
    """The place of rank 0, with a free port if there are other ranks."""
    port = find_free_network_port() if world_size > 1 else 0
    return Place(rank=0, world_size=world_size, port=port)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What rank 0 tells another rank: one line of JSON on its standard input."""

    place: Place
    arguments: list[str]
    """The arguments of src.train."""
    start: str | None
    """The checkpoint to continue from; None: start at step 0."""

    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def read(line: str) -> "Orders":
        values: dict[str, Any] = json.loads(line)
        return Orders(**{**values, "place": Place(**values["place"])})


@contextlib.contextmanager
def other_ranks(
    place: Place, *, arguments: Sequence[str], start: Path | None, folder: Path
) -> Iterator[None]:
    """Starts the other ranks of a run; inside this context they are about to train.

    Args:
        place: the place of this process, rank 0.
        arguments: the arguments of src.train.
        start: the checkpoint to continue from; None: start at step 0.
        folder: where `rank-<n>.log` is written, with the output of rank n.

    Raises:
        RuntimeError: a rank ended before it could train.
    """
    ranks = [
        _OtherRank(
            Orders(
                place=Place(rank=rank, world_size=place.world_size, port=place.port),
                arguments=list(arguments),
                start=None if start is None else str(start),
            ),
            folder / f"rank-{rank}.log",
        )
        for rank in range(1, place.world_size)
    ]
    try:
        for other in ranks:
            other.wait_until_ready()
        yield
        for other in ranks:
            other.expect_end()
        deadline = time.monotonic() + END_SECONDS
        for other in ranks:
            other.wait(deadline - time.monotonic())
    finally:
        for other in ranks:
            other.expect_end()
        for other in ranks:
            other.end()


class _OtherRank:
    """A process of another rank, seen from rank 0."""

    def __init__(self, orders: Orders, log: Path) -> None:
        self.rank, self.log = orders.place.rank, log
        self._may_end = False
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                # A session of its own, so that Ctrl-C in the terminal reaches rank 0 only.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        assert self.process.stdin is not None
        # If the process has ended already, `wait_until_ready` reports it.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(orders.text())
            self.process.stdin.flush()

    def wait_until_ready(self) -> None:
        """Returns when the process is about to train; RuntimeError if it ended instead."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != READY:
            self.process.wait()
            raise RuntimeError(self._how_it_ended())
        threading.Thread(target=self._watch, name=f"rank-{self.rank}", daemon=True).start()

    def _how_it_ended(self) -> str:
        return (
            f"rank {self.rank} ended with exit code {self.process.returncode}; its log: {self.log}"
        )

    def _watch(self) -> None:
        """Ends rank 0 if the process dies: rank 0 could wait for it for ever, at least on a GPU."""
        if self.process.wait() == 0 or self._may_end:
            return
        # Printed at once, because the error that rank 0 gets from the lost connection names neither
        # the rank nor its log.
        terminal.error(self._how_it_ended())
        time.sleep(GRACE_SECONDS)
        if not self._may_end:
            os._exit(FAILURE)

    def expect_end(self) -> None:
        """From here on the end of the process is not an error."""
        self._may_end = True

    def wait(self, seconds: float) -> None:
        """Waits at most `seconds` for the process to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))

    def end(self) -> None:
        """Ends the process if it still runs: it exits when its standard input is closed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
