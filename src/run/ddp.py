"""Processes that share the steps of one run: who is who, how they are started and watched.

The first, rank 0, is the process of the command: it alone decides, writes and shows. It starts the
others once all is decided, and they end with it, whatever ends it.
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
"""What Python runs for another process."""

READY = "ready\n"
"""What a process says when it is about to train."""

END_SECONDS = 20.0
"""That the others together have to end after the first."""
GRACE_SECONDS = 30.0
"""Between the death of one process and the end of the first by force, where it waits for ever."""

FAILURE = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among those of its run, all on one machine."""

    rank: int
    """From 0."""
    world_size: int
    port: int
    """On 127.0.0.1, where they find each other; 0 where there is only one."""


class Ranks(ClusterEnvironment):
    """Tells Lightning of a place.

    Given always, so that Lightning never takes a job of Slurm's with one task for a run on several
    nodes, nor requeues it by itself.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        """They are there already."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """See Place."""
        return self.place.port

    @staticmethod
    def detect() -> bool:
        """It is given, never guessed."""
        return False

    def world_size(self) -> int:
        """See Place."""
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """See Place."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """All are on one machine."""
        return self.place.rank

    def node_rank(self) -> int:
        """All are on one machine."""
        return 0


def first_place(world_size: int) -> Place:
    """The place of the process of the command."""
    port = find_free_network_port() if world_size > 1 else 0
    return Place(rank=0, world_size=world_size, port=port)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What another process is told; one line of JSON on its standard input."""

    place: Place
    arguments: list[str]
    """Of src.train."""
    start: str | None
    """The checkpoint from which the run goes on."""

    def text(self) -> str:
        """The line."""
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def read(line: str) -> "Orders":
        """From the line."""
        values: dict[str, Any] = json.loads(line)
        return Orders(**{**values, "place": Place(**values["place"])})


@contextlib.contextmanager
def others(
    place: Place, *, arguments: Sequence[str], start: Path | None, folder: Path
) -> Iterator[None]:
    """Inside, the other processes of a run are there and about to train.

    Args:
        place: of this process, the first.
        arguments: of src.train.
        start: the checkpoint from which the run goes on.
        folder: gets `rank-<n>.log`, all that they say.

    Raises:
        RuntimeError: one has ended before it could train.
    """
    team = [
        _Other(
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
        for other in team:
            other.wait_until_ready()
        yield
        for other in team:
            other.let_go()
        deadline = time.monotonic() + END_SECONDS
        for other in team:
            other.wait(deadline - time.monotonic())
    finally:
        for other in team:
            other.let_go()
        for other in team:
            other.dismiss()


class _Other:
    """One process, seen from the first."""

    def __init__(self, orders: Orders, log: Path) -> None:
        self.rank, self.log = orders.place.rank, log
        self._over = False
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                # A group of its own: no Ctrl-C of the terminal reaches it.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        assert self.process.stdin is not None
        # One that is gone already is told of when it is waited for.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(orders.text())
            self.process.stdin.flush()

    def wait_until_ready(self) -> None:
        """Returns when it is about to train. Raises RuntimeError where it has ended instead."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != READY:
            self.process.wait()
            raise RuntimeError(self._how())
        threading.Thread(target=self._watch, name=f"rank-{self.rank}", daemon=True).start()

    def _how(self) -> str:
        return (
            f"rank {self.rank} ended with exit code {self.process.returncode}; its log: {self.log}"
        )

    def _watch(self) -> None:
        """The death of one leaves the first waiting for it, on a GPU perhaps for ever."""
        if self.process.wait() == 0 or self._over:
            return
        # At once: what the first says when a connection is gone names neither process nor log.
        terminal.error(self._how())
        time.sleep(GRACE_SECONDS)
        if not self._over:
            os._exit(FAILURE)

    def let_go(self) -> None:
        """From here on it may end, however it does."""
        self._over = True

    def wait(self, seconds: float) -> None:
        """Lets it end of itself, for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))

    def dismiss(self) -> None:
        """Ends it if it is still there: it goes when its standard input ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
